/**
 * The rules of places in a clip, as pusa.positions and pusa.request have them: tests/server/studio/position_cases.json
 * holds both to the same answers.
 *
 * A VAE makes one latent frame of the first frame and one of every `factor` frames after it.
 */

const MOST_VALUES = 512; // of a list
const POSITION = /^(?:(-?[0-9]{1,7})(f?)|(-?[0-9]{1,7}(?:\.[0-9]{1,3})?)s|last)$/;
const NUMBER = /^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?$/;

/**
 * @typedef {object} Position
 * @property {"latent"|"frame"|"second"} unit
 * @property {number} value  negative counts from the end; latent frame -1 is "last"
 */

/**
 * @typedef {object} Clip
 * @property {number} frames
 * @property {number} fps
 * @property {number} factor  frames of a latent frame after the first
 */

/** What is wrong with a place or a list; its text is `timeline.problem.CODE` with these values. */
export class PositionError extends Error {
  /** @param {string} code @param {Record<string, any>} values */
  constructor(code, values = {}) {
    super(code);
    this.code = code;
    this.values = values;
  }
}

/** Round to the nearest whole number, halves to the even one, as Python does. @param {number} value */
function roundHalfEven(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return Math.round(value) + 0;
  return low % 2 === 0 ? low : low + 1;
}

/** @param {number} frames @param {number} factor @returns {number} latent frames of so many frames */
export const latentFrames = (frames, factor) => Math.floor((frames - 1) / factor) + 1;

/** @param {number} latents @param {number} factor @returns {number} frames that these decode to */
export const framesOf = (latents, factor) => factor * (latents - 1) + 1;

/**
 * The nearest `multiple * n + offset` of at least 1; halves go up.
 * @param {number} value @param {number} multiple @param {number} offset
 */
export function nearestOf(value, multiple, offset = 0) {
  const whole = Math.floor((value - offset + Math.floor(multiple / 2)) / multiple) * multiple;
  return Math.max(whole, offset ? 0 : multiple) + offset;
}

/** @param {number} cell latent frame @param {number} factor @returns {[number, number]} its first and last frame */
export function frameRange(cell, factor) {
  return cell === 0 ? [0, 0] : [factor * (cell - 1) + 1, factor * cell];
}

/**
 * Read one place: "3" (latent frame), "80f" (frame), "1.5s" (time) or "last".
 * @param {string} text
 * @returns {Position}
 */
export function parsePosition(text) {
  const match = POSITION.exec(text.trim().toLowerCase());
  if (!match) throw new PositionError("position", { text: text.trim().slice(0, 40) });
  const [, whole, frame, seconds] = match;
  if (seconds !== undefined) return { unit: "second", value: Number(seconds) + 0 };
  if (whole === undefined) return { unit: "latent", value: -1 };
  return { unit: frame ? "frame" : "latent", value: Number(whole) + 0 };
}

/** @param {Position} position @returns {string} such as "last" or "1.5s" */
export function formatPosition({ unit, value }) {
  if (unit === "second") return `${Number(value.toFixed(3))}s`;
  if (unit === "latent" && value === -1) return "last";
  return unit === "frame" ? `${value}f` : `${value}`;
}

/**
 * The latent frame that holds a place of a clip.
 * @param {Position} position @param {Clip} clip
 * @returns {number}
 * @throws {PositionError} it is outside the clip
 */
export function latentIndex({ unit, value }, { frames, fps, factor }) {
  const count = latentFrames(frames, factor);
  if (unit === "latent") return within(value, count, "latent_outside", { value, last: count - 1 });
  let frame = value;
  if (unit === "second") {
    frame = roundHalfEven(value * fps);
    if (value < 0) frame = Math.min(frame, -1); // the shortest time before the end is the last frame
    within(frame, frames, "second_outside", { value, seconds: frames / fps });
  }
  frame = within(frame, frames, "frame_outside", { value, last: frames - 1 });
  return Math.floor((frame - 1) / factor) + 1;
}

/** @param {number} index @param {number} count @param {string} code @param {object} values */
function within(index, count, code, values) {
  if (index < -count || index >= count) throw new PositionError(code, values);
  return index < 0 ? index + count : index;
}

/**
 * Split a text at commas, semicolons or blanks; those at its ends do not count.
 * @param {string} text
 * @returns {string[]}
 */
export function splitList(text) {
  const inner = text
    .trim()
    .replace(/^[,;，、]+|[,;，、]+$/g, "")
    .trim();
  const parts = inner.split(/\s*[,;，、]\s*|\s+/);
  if (parts.length > MOST_VALUES) throw new PositionError("too_many", { count: parts.length, most: MOST_VALUES });
  return parts;
}

/** Read "0,1.5s,last". @param {string} text @returns {Position[]} */
export const parsePositions = (text) => splitList(text).map(parsePosition);

/** Read noise multipliers such as "0,0.3"; none in an empty text. @param {string} text @returns {number[]} */
export function parseNoise(text) {
  if (!text.trim()) return [];
  return splitList(text).map((part) => {
    const value = part.length <= 100 && NUMBER.test(part) ? Number(part) : NaN;
    if (!(value >= 0 && value <= 1)) throw new PositionError("noise", { text: part.slice(0, 40) });
    return value;
  });
}

/**
 * A preset's noise of `count` pictures or latent frames: the last value repeats.
 * @param {number[]} values @param {number} count
 */
export const presetNoise = (values, count) =>
  Array.from({ length: count }, (_, number) => values[Math.min(number, values.length - 1)]);

/**
 * The frames that a continuation takes over by default: `most`, or as many as half a window has.
 * @param {number} window frames @param {number} factor @param {number} most @param {1|2} sides
 */
export function defaultOverlap(window, factor, most, sides = 1) {
  const length = latentFrames(window, factor);
  const half = sides === 2 ? Math.floor((length - 1) / 2) : Math.floor(length / 2);
  return Math.min(nearestOf(most, factor, 1), framesOf(Math.max(1, half), factor));
}

/**
 * The frames that a transition takes over from each clip on this page, so that a third of the clip is new.
 * @param {number} window frames @param {number} factor @param {number} most
 */
export function transitionOverlap(window, factor, most) {
  const length = latentFrames(window, factor);
  const kept = Math.floor((length - Math.ceil(length / 3)) / 2);
  return Math.min(nearestOf(most, factor, 1), framesOf(Math.max(1, kept), factor));
}

/**
 * Space `count` pictures evenly over a clip of `latents` latent frames, from its first to its last.
 * @param {number} count @param {number} latents @returns {number[]} latent frames
 */
export function spread(count, latents) {
  if (count === 1) return [0];
  return Array.from({ length: count }, (_, number) => roundHalfEven((number * (latents - 1)) / (count - 1)));
}
