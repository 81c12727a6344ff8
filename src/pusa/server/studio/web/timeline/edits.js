/** Changes of the form that the timeline makes. Pure: each returns what to `edit`, or null where nothing changes. */
import {
  PositionError,
  framesOf,
  latentIndex,
  parseNoise,
  parsePosition,
  parsePositions,
  splitList,
} from "../core/positions.js";
import { keptOf, keptText, layoutOf, lengthOf, usedItems, widestGap } from "./model.js";

/** @typedef {import("../core/store.js").Form} Form */
/** @typedef {import("../core/store.js").Item} Item */
/** @typedef {Partial<Form>|null} Change */

/** @param {number} noise @returns {number} in 0..1, to a hundredth */
export const roundNoise = (noise) => Math.round(Math.min(1, Math.max(0, noise)) * 100) / 100 + 0;

/** @param {Form} form @param {string} id @param {Partial<Item>} change @returns {Partial<Form>} */
export const changeItem = (form, id, change) => ({
  items: form.items.map((item) => (item.id === id ? { ...item, ...change } : item)),
  clips: form.clips.map((item) => (item.id === id ? { ...item, ...change } : item)),
});

/**
 * Set all pictures' places by hand as they are shown, so that none moves when another does.
 * @param {Form} form @param {any} model @returns {Item[]}
 */
function pinned(form, model) {
  const shown = new Map(layoutOf(form, model).pictures.map((one) => [one.item.id, one]));
  return form.items.map((item) => {
    const one = shown.get(item.id);
    return item.position === null && one && one.cell !== null ? { ...item, position: one.text } : item;
  });
}

/**
 * Move a picture to a latent frame that no other picture holds.
 * @param {Form} form @param {any} model @param {string} id @param {number} cell
 * @returns {Change}
 */
export function movePicture(form, model, id, cell) {
  if (form.tab !== "images") return null;
  const layout = layoutOf(form, model);
  const moved = layout.pictures.find((one) => one.item.id === id);
  if (!moved || cell < 0 || cell >= layout.length.count || moved.cell === cell) return null;
  if (layout.pictures.some((one) => one !== moved && one.cell === cell)) return null;
  const position = cell === layout.length.count - 1 && cell > 0 ? "last" : String(cell);
  return { items: pinned(form, model).map((item) => (item.id === id ? { ...item, position } : item)) };
}

/**
 * The next free latent frame beside a picture.
 * @param {Form} form @param {any} model @param {string} id @param {1|-1} direction
 * @returns {number|null}
 */
export function nextFree(form, model, id, direction) {
  const { pictures, length } = layoutOf(form, model);
  const from = pictures.find((one) => one.item.id === id)?.cell;
  if (from === null || from === undefined) return null;
  for (let cell = from + direction; cell >= 0 && cell < length.count; cell += direction) {
    if (!pictures.some((one) => one.cell === cell)) return cell;
  }
  return null;
}

/**
 * Put a new item on a latent frame, in the order of their places; where a picture lies already, it takes its place.
 * Without a place it is added at the end and placed automatically.
 * @param {Form} form @param {any} model @param {Item} item @param {number|null} cell
 * @returns {Partial<Form>}
 */
export function addPicture(form, model, item, cell) {
  const isLoop = form.tab === "video" && form.mode === "loop";
  const layout = layoutOf(form, model);
  const there = layout.pictures.find((one) => one.cell === cell);
  if (cell !== null && there) {
    const replaced = { ...item, position: there.item.position, noise: there.item.noise };
    return { items: form.items.map((old) => (old.id === there.item.id ? replaced : old)) };
  }
  if (isLoop) return { items: [item, ...form.items.slice(1)] };
  if (form.tab !== "images" && !usedItems(form).length && (cell === null || cell === 0)) {
    return { tab: form.tab === "text" ? "image" : form.tab, items: [item, ...form.items.slice(1)] };
  }
  const wide = /** @type {Form} */ ({ ...form, tab: "images" });
  if (cell === null) return { tab: "images", items: [...form.items, item] };
  const others = pinned(wide, model);
  const shown = layoutOf({ ...wide, items: others }, model).pictures;
  const taken = shown.map((one) => one.cell);
  const free = taken.includes(cell) ? widestGap(taken, layout.length.count) : cell;
  const position = free === layout.length.count - 1 ? "last" : String(free ?? cell);
  const before = shown.filter((one) => one.cell !== null && one.cell < cell).length;
  const order = others.findIndex((_, index) => (shown[index].cell ?? Infinity) > cell);
  const at = order === -1 || before === others.length ? others.length : order;
  return { tab: "images", items: [...others.slice(0, at), { ...item, position }, ...others.slice(at)] };
}

/** @param {Form} form @param {string} id @returns {Partial<Form>} */
export const removeItem = (form, id) => ({
  items: form.items.filter((item) => item.id !== id),
  clips: form.clips.filter((item) => item.id !== id),
});

/** @param {Form} form @returns {Partial<Form>} the form without places set by hand */
export const spreadEvenly = (form) => ({ items: form.items.map((item) => ({ ...item, position: null })) });

/**
 * Set the clip's length to whole latent frames.
 * @param {Form} form @param {any} model @param {number} count latent frames
 * @returns {Change}
 */
export function setLength(form, model, count) {
  const { least, most } = lengthLimits(model);
  const wanted = Math.min(most, Math.max(least, Math.round(count)));
  const now = lengthOf(form, model);
  return wanted === now.count ? null : { frames: framesOf(wanted, now.factor) };
}

/** @param {any} model @returns {{least: number, most: number}} latent frames of a clip */
export function lengthLimits(model) {
  const factor = model.frames_per_latent;
  const most = model.limits?.frames ?? 1281;
  return { least: 2, most: Math.floor((most - 1) / factor) + 1 };
}

// ---- kept latent frames of a clip ----

/**
 * Keep or release a latent frame of the clip.
 * @param {Form} form @param {any} model @param {number} cell
 * @returns {Partial<Form>}
 */
export function toggleKept(form, model, cell) {
  const { kept } = keptOf(form, model, lengthOf(form, model));
  const has = kept.some((one) => one.cell === cell);
  const before = kept.filter((one) => one.cell < cell).at(-1);
  const next = has
    ? kept.filter((one) => one.cell !== cell)
    : [...kept, { cell, noise: before ? before.noise : 0, text: String(cell) }].sort((a, b) => a.cell - b.cell);
  return keptTexts(next, !form.keptNoise.trim());
}

/** @param {Form} form @param {any} model @param {number} cell @param {number} noise @returns {Change} */
export function setKeptNoise(form, model, cell, noise) {
  const { kept } = keptOf(form, model, lengthOf(form, model));
  if (!kept.some((one) => one.cell === cell)) return null;
  return keptTexts(
    kept.map((one) => (one.cell === cell ? { ...one, noise: roundNoise(noise) } : one)),
    false,
  );
}

/** @param {import("./model.js").Kept[]} kept @param {boolean} byPreset @returns {Partial<Form>} */
const keptTexts = (kept, byPreset) => ({
  keptPositions: kept.map((one) => one.text).join(","),
  keptNoise: byPreset ? "" : kept.map((one) => one.noise).join(","),
});

// ---- places and noise as text ----

/** @param {Form} form @param {any} model @returns {string} such as "0,12,last" */
export function positionsText(form, model) {
  if (form.tab === "video") return keptText(form, model);
  return layoutOf(form, model)
    .pictures.map((one) => one.text)
    .join(",");
}

/** @param {Form} form @param {any} model @returns {string} such as "0.2,0.5" */
export function noiseText(form, model) {
  const { pictures, kept } = layoutOf(form, model);
  return (form.tab === "video" ? kept : pictures).map((one) => one.noise).join(",");
}

/**
 * Take over places that somebody wrote. Fewer than there are pictures: the rest is placed automatically.
 * @param {Form} form @param {any} model @param {string} text
 * @returns {Partial<Form>}
 * @throws {PositionError} with a `part`, where one place of several is wrong
 */
export function readPositions(form, model, text) {
  const length = lengthOf(form, model);
  const isEmpty = !text.trim();
  const parts = isEmpty ? [] : splitList(text);
  const cells = parts.map((part) => latentIndex(parsePosition(part), length));
  const twice = cells.find((cell, number) => cells.indexOf(cell) !== number);
  if (twice !== undefined) throw new PositionError("two_places", { cell: twice });
  const texts = parts.map((part) => part.trim().toLowerCase());
  if (form.tab === "video") {
    parsePositions(texts.join(",") || "0");
    const count = form.keptNoise.trim() ? splitList(form.keptNoise).length : 0;
    const keptNoise = count > 1 && count !== texts.length ? "" : form.keptNoise;
    return { keptPositions: isEmpty ? null : texts.join(","), keptNoise };
  }
  if (texts.length > form.items.length) {
    throw new PositionError("position_count", { positions: texts.length, pictures: form.items.length });
  }
  return { items: form.items.map((item, number) => ({ ...item, position: texts[number] ?? null })) };
}

/**
 * Take over noise that somebody wrote: one for all, one for each, or none for the preset's.
 * @param {Form} form @param {any} model @param {string} text
 * @returns {Partial<Form>}
 * @throws {PositionError}
 */
export function readNoise(form, model, text) {
  const values = parseNoise(text);
  const { kept, pictures } = layoutOf(form, model);
  const count = form.tab === "video" ? kept.length : pictures.length;
  if (values.length > 1 && values.length !== count) {
    throw new PositionError("noise_count", { noise: values.length, count });
  }
  if (form.tab === "video") {
    const places = values.length > 1 ? { keptPositions: keptText(form, model) } : {}; // what each of them is for
    return { ...places, keptNoise: values.join(",") };
  }
  const of = (/** @type {number} */ number) => (values.length === 1 ? values[0] : (values[number] ?? null));
  return { items: form.items.map((item, number) => ({ ...item, noise: number < count ? of(number) : item.noise })) };
}

/** Put "last" in the place of what lies after the end. @param {Form} form @param {any} model @param {string} text */
export function withLast(form, model, text) {
  const length = lengthOf(form, model);
  const parts = splitList(text).map((part) => {
    try {
      latentIndex(parsePosition(part), length);
      return part;
    } catch (error) {
      return isAfterEnd(error) ? "last" : part;
    }
  });
  return parts.join(",");
}

/** Tell whether a place is wrong because the clip ends before it. @param {any} error */
export const isAfterEnd = (error) =>
  error instanceof PositionError && /_outside$/.test(error.code) && error.values.value >= 0;
