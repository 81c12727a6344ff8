/** Times and sizes in the visitor's words. */
import { language, t } from "../core/i18n.js";

/** @param {number} value @param {number} [digits] @returns {string} as the language writes it */
export const numberText = (value, digits = 0) =>
  new Intl.NumberFormat(language(), { maximumFractionDigits: digits }).format(value);

/** @param {number} seconds @returns {string} such as "12 s" or "3 min" */
export function durationText(seconds) {
  if (seconds < 9.5) return t("form.time.seconds", { n: numberText(seconds, 1) });
  if (seconds < 90) return t("form.time.seconds", { n: numberText(seconds) });
  if (seconds < 5400) return t("form.time.minutes", { n: numberText(seconds / 60) });
  return t("form.time.hours", { n: numberText(seconds / 3600, 1) });
}

/** @param {number} bytes @returns {string} such as "1.4 GB" */
export function bytesText(bytes) {
  if (bytes < 1e9) return t("form.megabytes", { n: numberText(bytes / 1e6) });
  return t("form.gigabytes", { n: numberText(bytes / 1e9, bytes < 1e10 ? 1 : 0) });
}
