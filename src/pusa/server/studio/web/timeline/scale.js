/** Where things stand on the timeline, in pixels. Pure. */

/** Least pixels of a latent frame at which its picture can still be told apart. */
export const LEAST_CELL = 14;
export const MOST_CELL = 320;
export const FINGER_CELL = 40; // the same where a finger presses latent frames themselves
const RULER_STEPS = [0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300];

/**
 * Pixels of a latent frame.
 * @param {number} width  of what is visible @param {number} count latent frames
 * @param {number|null} zoom  pixels that the visitor chose; null: all of the clip, if that is legible
 * @param {number} [least]  pixels
 */
export function cellWidth(width, count, zoom, least = LEAST_CELL) {
  const fit = width / count;
  if (zoom === null) return Math.max(least, fit);
  return Math.min(Math.max(MOST_CELL, fit), Math.max(least, fit, zoom));
}

/** @param {number} x pixels @param {number} cell pixels of one @param {number} count @returns {number} latent frame */
export const cellAt = (x, cell, count) => Math.min(count - 1, Math.max(0, Math.floor(x / cell)));

/**
 * Where a frame begins: latent frame 0 is one frame, every later one `factor` frames.
 * @param {number} frame @param {number} cell pixels @param {number} factor
 */
export const xOfFrame = (frame, cell, factor) => (frame <= 1 ? frame : 1 + (frame - 1) / factor) * cell;

/**
 * Marks of the ruler: seconds with their frame numbers, as many as can be read.
 * @param {{frames: number, fps: number, factor: number}} length @param {number} cell pixels @param {number} least pixels between two
 * @returns {{x: number, seconds: number, frame: number}[]}
 */
export function rulerMarks({ frames, fps, factor }, cell, least = 96) {
  const end = xOfFrame(frames, cell, factor);
  const perSecond = (fps / factor) * cell;
  const step = RULER_STEPS.find((one) => one * perSecond >= least) ?? 600;
  const marks = [];
  for (let number = 0; number * step * fps < frames; number += 1) {
    const seconds = Math.round(number * step * 1000) / 1000;
    marks.push({ x: xOfFrame(seconds * fps, cell, factor), seconds, frame: Math.round(seconds * fps) });
  }
  // Those that have no room are left out: a mark near the end, or the second one, should it stand near the first.
  return marks.filter(
    ({ x }, number) => (number !== 1 || x >= least * 0.6) && (number === 0 || x + least * 0.8 <= end),
  );
}

/** Every how many latent frames a number has room. @param {number} cell pixels */
export function indexStep(cell) {
  const steps = [1, 2, 5, 10, 20, 50];
  return steps.find((step) => step * cell >= 28) ?? 100;
}

/**
 * Lay out cards: each holds its cell, and is as wide as `ideal` where its neighbours leave room.
 * @param {number[]} cells latent frames, ascending @param {number} cell pixels @param {number} ideal pixels
 * @param {number} total pixels
 * @returns {{x: number, width: number}[]}
 */
export function placeCards(cells, cell, ideal, total) {
  const gap = Math.min(6, cell / 4);
  return cells.map((at, number) => {
    const before = cells[number - 1];
    const after = cells[number + 1];
    const low = before === undefined ? 0 : ((before + 1 + at) * cell + gap) / 2;
    const high = after === undefined ? total : ((at + 1 + after) * cell - gap) / 2;
    const left = before === at ? at * cell : Math.min(low, at * cell + gap / 2);
    const right = after === at ? (at + 1) * cell : Math.max(high, (at + 1) * cell - gap / 2);
    const width = Math.min(Math.max(ideal, cell), right - left);
    const x = Math.min(Math.max((at + 0.5) * cell - width / 2, left), right - width);
    return { x, width };
  });
}
