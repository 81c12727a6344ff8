/** Which size a video gets: that of the form, or one of about the model's pixels in the shape of the picture. Pure. */
import { nearestOf } from "./positions.js";

/** @typedef {import("./store.js").Form} Form */
/** @typedef {import("./store.js").Item} Item */
/** @typedef {{width: number, height: number}} Size */

const NEAR = Math.log(1.04); // of two aspect ratios: nothing to see is cut off
const MOST_ASPECT = 2.4; // longer pictures are cropped
const LEAST_SIDE = 80; // pixels; a small model's things lose their shape below
const AREA = [0.75, 1.15]; // of the model's pixels

/** @param {string} text such as "832x480" @returns {Size|null} */
export function parseSize(text) {
  const match = /^\s*(\d{1,4})\s*[x×*]\s*(\d{1,4})\s*$/i.exec(text);
  return match ? { width: Number(match[1]), height: Number(match[2]) } : null;
}

/** Width by height of what is used of an item; NaN where it is unknown. @param {Item} item */
export function aspectOf(item) {
  const [, , width, height] = item.crop ?? [0, 0, 1, 1];
  return (width * item.width) / (height * item.height);
}

/** @param {Form} form @returns {Item|undefined} what the open tab takes its shape from */
export function shapeGiver(form) {
  if (form.tab === "text") return undefined;
  return form.tab === "video" && form.mode !== "loop" ? form.clips[0] : form.items[0];
}

/**
 * A size of about the model's pixels for an aspect ratio; one that the model names, where it is of that shape.
 * @param {number} aspect width by height @param {any} model
 * @returns {Size}
 */
export function sizeFor(aspect, model) {
  const { width, height } = model.defaults;
  const wanted = Math.min(MOST_ASPECT, Math.max(1 / MOST_ASPECT, aspect));
  const named = [{ width, height }, { width: height, height: width }];
  for (const text of [...Object.values(model.shapes ?? {}), ...(model.sizes ?? [])]) named.push(/** @type {Size} */ (parseSize(text)));
  const pixels = width * height;
  const error = (/** @type {Size} */ size) => Math.abs(Math.log(size.width / size.height / wanted));
  const fits = (/** @type {Size} */ size, low = AREA[0], high = AREA[1]) =>
    size.width * size.height >= low * pixels && size.width * size.height <= high * pixels;
  const near = named.filter((size) => error(size) < NEAR && fits(size, 0.6, 1.36));
  if (near.length) return near.reduce((best, size) => (error(size) < error(best) ? size : best));
  const multiple = model.size_multiple;
  const found = [];
  const least = nearestOf(Math.min(LEAST_SIDE, width, height), multiple);
  for (let side = least; side <= Math.sqrt(pixels * MOST_ASPECT) * 1.1; side += multiple) {
    const other = Math.max(least, nearestOf(Math.round(side * wanted), multiple));
    found.push({ width: other, height: side });
  }
  const inside = found.filter((size) => fits(size));
  const cost = (/** @type {Size} */ size) => error(size) + 0.2 * Math.abs(Math.log((size.width * size.height) / pixels));
  return (inside.length ? inside : found).reduce((best, size) => (cost(size) < cost(best) ? size : best));
}

/**
 * Width and height of the video that the form asks for.
 * @param {Form} form @param {any} model
 * @returns {Size}
 */
export function targetSize(form, model) {
  const { width, height } = model.defaults;
  if (form.shape !== "auto") {
    const own = parseSize(model.shapes?.[form.shape] ?? form.shape);
    const multiple = model.size_multiple;
    return own ? { width: nearestOf(own.width, multiple), height: nearestOf(own.height, multiple) } : { width, height };
  }
  const aspect = aspectOf(shapeGiver(form) ?? /** @type {any} */ ({ width, height, crop: null }));
  return Number.isFinite(aspect) && aspect > 0 ? sizeFor(aspect, model) : { width, height };
}

/** Half a size, as a draft has it; the shorter side keeps 80 pixels. @param {Size} size @param {any} model @returns {Size} */
export function draftSize({ width, height }, model) {
  const scale = Math.min(1, Math.max(0.5, LEAST_SIDE / Math.min(width, height)));
  const round = (/** @type {number} */ side) => nearestOf(Math.round(side * scale), model.size_multiple);
  return { width: round(width), height: round(height) };
}
