/** Addresses of pictures that the server draws, and which region of a picture becomes the clip's. Pure. */
import { url } from "../core/api.js";

/** @typedef {import("../core/store.js").Item} Item */
/** @typedef {import("../core/store.js").Form} Form */
/** @typedef {[number, number, number, number]} Region  x, y, width, height as fractions of the upright picture */

/** @param {Item["source"]} source @returns {string} path of a file or result in the API */
const pathOf = (source) => (source.file_id ? `/v1/files/${source.file_id}` : `/v1/videos/${source.video_id}`);

/**
 * A still that the server draws: of every format that it reads, also where the browser cannot.
 * @param {Item} item @param {{width: number, index?: number|null, time?: number|null}} what
 */
export function frameUrl(item, { width, index = null, time = null }) {
  const place = index !== null ? `index=${index}&` : time !== null ? `time=${time.toFixed(3)}&` : "";
  return url(`${pathOf(item.source)}/frame?${place}width=${width}`);
}

/** @param {Item} item @param {number} count frames side by side @param {number} height pixels */
export const stripUrl = (item, count, height) => url(`${pathOf(item.source)}/strip?count=${count}&height=${height}`);

/** @param {Item} item */
export const contentUrl = (item) => url(`${pathOf(item.source)}/content`);

/** The picture of an item: itself, or the frame of a clip that it is. @param {Item} item @param {number} width */
export const stillUrl = (item, width) =>
  frameUrl(item, { width, index: item.kind === "video" ? (item.frame ?? 0) : null });

/**
 * The region of a picture that fills a clip of an aspect ratio; with "letterbox" it reaches beyond the picture.
 * @param {Item} item @param {number} aspect width by height @param {Form["fit"]} fit
 * @returns {{region: Region, cut: number}} `cut`: fraction of the picture, or of its hand-set frame, that is lost
 */
export function regionOf(item, aspect, fit) {
  const [x, y, width, height] = item.crop ?? [0, 0, 1, 1];
  const own = (width * item.width) / (height * item.height);
  if (fit === "stretch" || !Number.isFinite(own)) return { region: [x, y, width, height], cut: 0 };
  const isWide = own > aspect;
  if (isWide === (fit === "crop")) {
    const inner = (width * aspect) / own;
    return { region: [x + (width - inner) / 2, y, inner, height], cut: fit === "crop" ? 1 - aspect / own : 0 };
  }
  const inner = (height * own) / aspect;
  return { region: [x, y + (height - inner) / 2, width, inner], cut: fit === "crop" ? 1 - own / aspect : 0 };
}

/** Where the image lies in a box that shows a region of it. @param {Region} region @returns {string} style */
export function regionStyle([x, y, width, height]) {
  const percent = (/** @type {number} */ value) => `${(100 * value).toFixed(3)}%`;
  return `width:${percent(1 / width)};height:${percent(1 / height)};left:${percent(-x / width)};top:${percent(-y / height)}`;
}

/** The largest region of an aspect ratio in the middle of a picture. @param {Item} item @param {number} aspect @returns {Region} */
export const middleRegion = (item, aspect) => regionOf({ ...item, crop: null }, aspect, "crop").region;
