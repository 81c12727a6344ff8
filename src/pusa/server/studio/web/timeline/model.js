/** What the timeline shows: latent frames, what holds each of them, and what is wrong. Pure: made of form and model. */
import {
  PositionError,
  defaultOverlap,
  frameRange,
  framesOf,
  latentFrames,
  latentIndex,
  nearestOf,
  parseNoise,
  parsePosition,
  presetNoise,
  splitList,
  spread,
  transitionOverlap,
} from "../core/positions.js";

/** @typedef {import("../core/store.js").Form} Form */
/** @typedef {import("../core/store.js").Item} Item */
const USUALLY_KEPT = 4; // latent frames of a clip, where none are chosen

/** @typedef {"image"|"images"|"text"|"complete"|"extend"|"transition"|"loop"} Kind */

/**
 * @typedef {object} Length
 * @property {number} factor  frames of a latent frame after the first
 * @property {number} frames
 * @property {number} fps
 * @property {number} count   latent frames
 * @property {number} seconds
 */

/**
 * A picture and where it goes.
 * @typedef {object} Placed
 * @property {Item} item
 * @property {number} number  1, 2, 3 in the order of the form
 * @property {number|null} cell  latent frame; null: outside the clip
 * @property {number} noise
 * @property {boolean} automatic  not placed by hand
 * @property {string} text  its place as text
 */

/** @typedef {{cell: number, noise: number, text: string}} Kept  a kept latent frame of a clip */
/** @typedef {{role: "clip"|"end"|"new"|"start"|"bridge", from: number, to: number, clip: number|null}} Part  cells from..to-1 */
/** @typedef {{code: string, values: Record<string, any>, id?: string}} Problem */

/**
 * @typedef {object} Layout
 * @property {Kind} kind
 * @property {Length} length
 * @property {Placed[]} pictures  in the order of the form
 * @property {Kept[]} kept
 * @property {Part[]} parts
 * @property {number} overlap  frames that are taken over of each clip
 * @property {number} before  seconds of the first clip that are shown before the timeline
 * @property {number} after   seconds of the second clip that are shown after it
 * @property {number} total   seconds of the whole result
 * @property {Problem[]} problems
 */

/** @param {Form} form @returns {Kind} */
export const kindOf = (form) => (form.tab === "video" ? form.mode : form.tab);

/** @param {Form} form @param {any} model @returns {Length} */
export function lengthOf(form, model) {
  const factor = model.frames_per_latent;
  const frames = nearestOf(form.frames ?? model.defaults.num_frames, factor, 1);
  const fps = form.fps ?? model.defaults.fps;
  return { factor, frames, fps, count: latentFrames(frames, factor), seconds: frames / fps };
}

/**
 * The frames that a continuation takes over of each clip: the form's, or the default of its task.
 * @param {Form} form @param {any} model @returns {number} whole latent frames
 */
export function overlapFrames(form, model) {
  const { factor, frames } = lengthOf(form, model);
  const window = windowOf(frames, model);
  if (form.overlap) return nearestOf(form.overlap, factor, 1);
  const most = model.defaults.overlap;
  if (kindOf(form) === "transition") return transitionOverlap(window, factor, most);
  return defaultOverlap(window, factor, most, kindOf(form) === "loop" ? 2 : 1);
}

/**
 * The frames that the server takes over of each clip of a transition where a request names none.
 * @param {Form} form @param {any} model @returns {number}
 */
export function serversOverlap(form, model) {
  const { factor, frames } = lengthOf(form, model);
  return defaultOverlap(windowOf(frames, model), factor, model.defaults.overlap, 2);
}

/** @param {number} frames @param {any} model */
const windowOf = (frames, model) =>
  Math.min(frames, nearestOf(model.defaults.window ?? model.defaults.num_frames, model.frames_per_latent, 1));

/** @param {Form} form @returns {Item[]} the pictures that the open tab uses */
export function usedItems(form) {
  if (form.tab === "images") return form.items;
  if (form.tab === "image" || (form.tab === "video" && form.mode === "loop")) return form.items.slice(0, 1);
  return [];
}

/** @param {Form} form @returns {Item[]} the clips that the open tab uses */
export function usedClips(form) {
  if (form.tab !== "video" || form.mode === "loop") return [];
  return form.clips.slice(0, form.mode === "transition" ? 2 : 1);
}

/**
 * Place pictures: those set by hand where they are set; the others evenly over what is left between their neighbours,
 * in the order of the form, or in the middle of the widest gap.
 * @param {Item[]} items @param {Length} length
 * @returns {(number|null)[]} latent frames; null: set outside the clip
 */
export function placeItems(items, length) {
  const set = items.map((item) => (item.position === null ? undefined : cellOf(item.position, length)));
  if (set.every((cell) => cell === undefined) && items.length <= length.count)
    return spread(items.length, length.count);
  const cells = [...set];
  let first = 0;
  while (first < items.length) {
    if (cells[first] !== undefined) {
      first += 1;
      continue;
    }
    let end = first;
    while (end < items.length && set[end] === undefined) end += 1;
    const run = runOf(end - first, set[first - 1], set[end], length.count, cells);
    run.forEach((cell, number) => (cells[first + number] = cell));
    first = end;
  }
  return cells.map((cell) => cell ?? null);
}

/** @param {string} text @param {Length} length @returns {number|null} */
function cellOf(text, length) {
  try {
    return latentIndex(parsePosition(text), length);
  } catch (error) {
    if (error instanceof PositionError) return null;
    throw error;
  }
}

/**
 * Places for `size` pictures between two that are placed.
 * @param {number} size @param {number|null|undefined} before @param {number|null|undefined} after @param {number} count
 * @param {(number|null|undefined)[]} taken
 * @returns {(number|null)[]}
 */
function runOf(size, before, after, count, taken) {
  const low = before ?? -1;
  const high = after ?? count;
  const gap = high - low - 1;
  const found = [];
  if (gap >= size) {
    // With a free end of the clip the run begins, or ends, right there.
    const start = low < 0 ? 0 : low;
    const stop = high >= count ? count - 1 : high;
    const steps = size - 1 + (low < 0 ? 0 : 1) + (high >= count ? 0 : 1);
    for (let number = 0; number < size; number += 1) {
      const step = number + (low < 0 ? 0 : 1);
      found.push(steps === 0 ? start : Math.round(start + ((stop - start) * step) / steps));
    }
    if (found.every((cell) => !taken.includes(cell))) return found;
  }
  const all = [...taken];
  return Array.from({ length: size }, () => {
    const cell = widestGap(all, count);
    all.push(cell);
    return cell;
  });
}

/** @param {(number|null|undefined)[]} taken @param {number} count @returns {number|null} null: no cell is free */
export function widestGap(taken, count) {
  const cells = [-1, ...new Set(taken.filter((cell) => typeof cell === "number")), count].sort(
    (a, b) => Number(a) - Number(b),
  );
  let best = /** @type {{size: number, cell: number|null}} */ ({ size: 0, cell: null });
  for (let number = 1; number < cells.length; number += 1) {
    const [low, high] = [Number(cells[number - 1]), Number(cells[number])];
    const size = high - low - 1;
    if (size <= best.size) continue;
    best = { size, cell: low < 0 ? 0 : high === count ? count - 1 : low + Math.ceil(size / 2) };
  }
  return best.cell;
}

/** @param {Form} form @param {any} model @returns {number[]} noise of each picture by the preset */
const pictureNoise = (form, model) => presetNoise(model.presets[form.preset].noise_multipliers, usedItems(form).length);

/**
 * Seconds of a clip that are used.
 * @param {Item} clip
 */
export const usedSeconds = (clip) => Math.max(0, (clip.end ?? clip.seconds ?? 0) - (clip.start ?? 0));

/** @param {Item} clip @param {number} fps @returns {number} frames of its used part at the result's rate */
const usedFrames = (clip, fps) => Math.max(1, Math.round(usedSeconds(clip) * fps));

/**
 * @param {Form} form @param {any} model  as GET /v1/models/{id} describes it
 * @returns {Layout}
 */
export function layoutOf(form, model) {
  const length = lengthOf(form, model);
  const kind = kindOf(form);
  /** @type {Layout} */
  const layout = {
    kind,
    length,
    pictures: [],
    kept: [],
    parts: [],
    overlap: 0,
    before: 0,
    after: 0,
    total: length.seconds,
    problems: [],
  };
  if (kind === "complete") complete(layout, form, model);
  else if (kind === "extend" || kind === "transition") continuation(layout, form, model);
  else if (kind === "loop") loop(layout, form, model);
  pictures(layout, form, model);
  return layout;
}

/** @param {Layout} layout @param {Form} form @param {any} model */
function pictures(layout, form, model) {
  const items = usedItems(form);
  const isFixed = layout.kind !== "images";
  const cells = isFixed ? items.map(() => 0) : placeItems(items, layout.length);
  const noise = pictureNoise(form, model);
  const last = layout.length.count - 1;
  layout.pictures = items.map((item, index) => ({
    item,
    number: index + 1,
    cell: cells[index],
    noise: item.noise ?? noise[index],
    automatic: isFixed || item.position === null,
    text: (isFixed ? "0" : item.position) ?? (cells[index] === last && last > 0 ? "last" : String(cells[index] ?? "")),
  }));
  const seen = new Map();
  for (const { item, number, cell } of layout.pictures) {
    if (cell === null) {
      const code = item.position === null ? "no_room" : "outside";
      layout.problems.push({ code, values: { number, text: item.position, last }, id: item.id });
    } else if (seen.has(cell)) {
      layout.problems.push({ code: "twice", values: { first: seen.get(cell), second: number, cell }, id: item.id });
    } else seen.set(cell, number);
  }
}

/**
 * Latent frames that the used part of the form's clip fills, of the video's.
 * @param {Form} form @param {Length} length @returns {number} all of them where there is no clip yet
 */
function clipCells(form, length) {
  const clip = form.clips[0];
  return clip ? Math.min(length.count, latentFrames(usedFrames(clip, length.fps), length.factor)) : length.count;
}

/**
 * The latent frames of a clip that are kept, as text: the form's, or as many from the first on as are usual and there.
 * @param {Form} form @param {any} model @returns {string}
 */
export function keptText(form, model) {
  if (form.keptPositions !== null) return form.keptPositions;
  const count = Math.min(USUALLY_KEPT, clipCells(form, lengthOf(form, model)));
  return Array.from({ length: count }, (_, cell) => cell).join(",");
}

/** @param {Layout} layout @param {Form} form @param {any} model */
function complete(layout, form, model) {
  const { length } = layout;
  const clip = form.clips[0];
  const available = clipCells(form, length);
  if (clip) layout.parts.push({ role: "clip", from: 0, to: available, clip: 0 });
  const { kept, outside, problem } = keptOf(form, model, length);
  if (problem) layout.problems.push(problem);
  layout.kept = kept;
  if (outside.length) {
    layout.problems.push({ code: "kept_outside", values: { text: outside.join(", "), last: length.count - 1 } });
  }
  const beyond = kept.filter((one) => one.cell >= available);
  if (beyond.length) layout.problems.push({ code: "clip_ends", values: { cell: beyond[0].cell, last: available - 1 } });
}

/**
 * The kept latent frames of a clip, by cell.
 * @param {Form} form @param {any} model @param {Length} length
 * @returns {{kept: Kept[], outside: string[], problem: Problem|null}}  `problem`: of noise that is no number
 */
export function keptOf(form, model, length) {
  const text = keptText(form, model);
  const texts = text.trim() ? splitList(text) : [];
  const { own, problem } = ownNoise(form.keptNoise);
  const preset = presetNoise(model.presets[form.preset].video_noise_multipliers, texts.length);
  /** @type {Map<number, Kept>} */
  const kept = new Map();
  const outside = [];
  for (const [number, text] of texts.entries()) {
    const cell = cellOf(text, length);
    const noise = own.length === 1 ? own[0] : (own[number] ?? preset[number]);
    if (cell === null) outside.push(text);
    else if (!kept.has(cell)) kept.set(cell, { cell, noise, text });
  }
  return { kept: [...kept.values()].sort((a, b) => a.cell - b.cell), outside, problem };
}

/** @param {string} text @returns {{own: number[], problem: Problem|null}} */
function ownNoise(text) {
  try {
    return { own: parseNoise(text), problem: null };
  } catch (error) {
    if (!(error instanceof PositionError)) throw error;
    return { own: [], problem: { code: error.code, values: error.values } };
  }
}

/** @param {Layout} layout @param {Form} form @param {any} model */
function continuation(layout, form, model) {
  const { length } = layout;
  const isTransition = layout.kind === "transition";
  layout.overlap = overlapFrames(form, model);
  const kept = latentFrames(layout.overlap, length.factor);
  const to = isTransition ? length.count - kept : length.count;
  layout.parts = [
    { role: "end", from: 0, to: Math.min(kept, length.count), clip: 0 },
    { role: "new", from: kept, to: Math.max(kept, to), clip: null },
  ];
  if (isTransition) layout.parts.push({ role: "start", from: Math.max(kept, to), to: length.count, clip: 1 });
  const window = windowOf(length.frames, model);
  if (isTransition && length.frames > window) {
    layout.problems.push({ code: "transition_too_long", values: { seconds: window / length.fps, frames: window } });
  } else overlapProblem(layout, window, isTransition ? 2 : 1);
  const needed = [layout.overlap, length.factor * kept];
  let total = length.frames;
  for (const [index, clip] of usedClips(form).entries()) {
    const frames = usedFrames(clip, length.fps);
    const seconds = needed[index] / length.fps;
    if (frames < needed[index])
      layout.problems.push({ code: "clip_too_short", values: { number: index + 1, seconds } });
    const rest = Math.max(0, frames - needed[index]);
    total += rest;
    layout[index === 0 ? "before" : "after"] = rest / length.fps;
  }
  layout.total = total / length.fps;
}

/** @param {Layout} layout @param {Form} form @param {any} model */
function loop(layout, form, model) {
  const { length } = layout;
  layout.overlap = overlapFrames(form, model);
  const window = windowOf(length.frames, model);
  const bridge = latentFrames(window, length.factor) - 2 * latentFrames(layout.overlap, length.factor);
  layout.parts = [{ role: "bridge", from: Math.max(0, length.count - bridge), to: length.count, clip: null }];
  overlapProblem(layout, window, 2);
}

/** @param {Layout} layout @param {number} window frames @param {number} sides */
function overlapProblem(layout, window, sides) {
  const { factor } = layout.length;
  const made = latentFrames(window, factor);
  if (sides * latentFrames(layout.overlap, factor) < made) return;
  const most = Math.floor((made - 1) / sides);
  const code = most ? "overlap" : "too_short";
  layout.problems.push({ code, values: { overlap: layout.overlap, most: most ? framesOf(most, factor) : 0 } });
}

/** @param {number} cell @param {Length} length @returns {number} seconds at which it begins */
export const timeOf = (cell, length) => frameRange(cell, length.factor)[0] / length.fps;

/** @param {Layout} layout @returns {Map<number, Placed>} */
export const picturesByCell = (layout) =>
  new Map(layout.pictures.filter((one) => one.cell !== null).map((one) => [Number(one.cell), one]));
