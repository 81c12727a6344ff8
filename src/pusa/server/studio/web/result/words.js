/** Numbers, lengths of time and moments in the visitor's language, and where the files of a video are. */
import { url } from "../core/api.js";
import { signal } from "../core/dom.js";
import { language } from "../core/i18n.js";

/** Seconds since 1970, anew every half minute: what says "2 minutes ago" is drawn again. */
const now = signal(Date.now() / 1000);
setInterval(() => (now.value = Date.now() / 1000), 30_000);

/** @param {number} value @param {Intl.NumberFormatOptions} [options] @returns {string} */
export const number = (value, options) => new Intl.NumberFormat(language(), options).format(value);

/** @param {number} seconds @returns {string} such as "40 sec" or "3 min" */
export function duration(seconds) {
  const [value, unit, digits] =
    seconds < 90 ? [seconds, "second", seconds < 10 ? 1 : 0] : seconds < 5400 ? [seconds / 60, "minute", 0] : [seconds / 3600, "hour", 1];
  return number(/** @type {number} */ (value), {
    style: "unit",
    unit: /** @type {string} */ (unit),
    unitDisplay: "short",
    maximumFractionDigits: /** @type {number} */ (digits),
  });
}

/** @param {number} seconds whole ones: "40 sec" while a second more or less does not matter */
export const timeLeft = (seconds) => duration(Math.max(1, Math.ceil(seconds)));

/** @param {number} at  seconds since 1970 @returns {string} such as "5 min. ago" */
export function ago(at) {
  const format = new Intl.RelativeTimeFormat(language(), { numeric: "auto", style: "short" });
  const seconds = Math.min(0, at - now.value);
  if (seconds > -45) return format.format(0, "second");
  if (seconds > -3600) return format.format(Math.round(seconds / 60), "minute");
  if (seconds > -86_400) return format.format(Math.round(seconds / 3600), "hour");
  if (seconds > -604_800) return format.format(Math.round(seconds / 86_400), "day");
  return new Intl.DateTimeFormat(language(), { dateStyle: "medium" }).format(new Date(at * 1000));
}

/** @param {string} size  "832x480" @returns {string} */
export const sizeText = (size) => size.replace("x", " × ");

/**
 * @param {{id: string}} job
 * @param {"video"|"thumbnail"|"contact_sheet"|"gif"|"webp"|"last_frame"} [variant]
 * @returns {string} the address of a file of a video
 */
export const contentUrl = ({ id }, variant = "video") =>
  url(`/v1/videos/${id}/content${variant === "video" ? "" : `?variant=${variant}`}`);

/** Frames of a video side by side. @param {{id: string}} job @param {number} count @returns {string} */
export const stripOf = ({ id }, count) => url(`/v1/videos/${id}/strip?count=${count}&height=480`);

/**
 * The address of the first picture that a video is made from, or of a frame of its first clip.
 * @param {{id: string}} job @param {number} width  pixels at most @returns {string}
 */
export const inputUrl = ({ id }, width) => url(`/v1/videos/${id}/frame?input=0&width=${width}`);
