/** Numbers and names of the timeline in the visitor's language. */
import { language, t } from "../core/i18n.js";
import { frameRange } from "../core/positions.js";
import { timeOf } from "./model.js";

/** Making one takes longer than drawing the timeline. @type {Map<string, Intl.NumberFormat>} */
const formats = new Map();

/** @param {number} value @param {number} [digits] at most behind the point */
export function number(value, digits = 2) {
  const key = `${language()} ${digits}`;
  let format = formats.get(key);
  if (!format) {
    format = new Intl.NumberFormat(language(), { maximumFractionDigits: digits, useGrouping: false });
    formats.set(key, format);
  }
  return format.format(value);
}

/** @param {number} value seconds @param {number} [digits] */
export const seconds = (value, digits = 2) => t("timeline.seconds", { seconds: number(value, digits) });

/** @param {number} cell @param {import("./model.js").Length} length @returns {string} "latent frame 5, frames 17 to 20" */
export function placeName(cell, length) {
  const [first, last] = frameRange(cell, length.factor);
  return t(first === last ? "timeline.place_one" : "timeline.place", { cell, first, last });
}

/** What a screen reader says of a picture. @param {import("./model.js").Placed} one @param {import("./model.js").Length} length */
export function pictureText(one, length) {
  const values = {
    number: one.number,
    noise: number(one.noise),
    seconds: one.cell === null ? "" : number(timeOf(one.cell, length)),
  };
  return t(one.cell === null ? "timeline.picture_outside" : "timeline.picture_at", values);
}
