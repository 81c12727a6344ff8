/** Numbers as people type them. */

/**
 * Parse a number with a point or a comma; null if it is none.
 * @param {string} text @param {boolean} [whole]
 * @returns {number|null}
 */
export function parseNumber(text, whole = false) {
  const plain = text.trim().replace(",", ".");
  if (!/^[-+]?(\d+\.?\d*|\.\d+)$/.test(plain)) return null;
  const value = Number(plain);
  if (!Number.isFinite(value) || (whole && !Number.isInteger(value))) return null;
  return value;
}

/** @param {number} value @param {number} [min] @param {number} [max] */
export const clamp = (value, min = -Infinity, max = Infinity) => Math.min(max, Math.max(min, value));

/**
 * Write a number as it is edited: at most six decimals, a point.
 * @param {number} value
 */
export const plainNumber = (value) => (Number.isInteger(value) ? String(value) : String(Math.round(value * 1e6) / 1e6));

/**
 * The next value of a step up or down, on the grid of steps from `min` on.
 * @param {number} value @param {number} direction  1 or -1, or a multiple
 * @param {number} step @param {number} [min] @param {number} [max]
 */
export function stepped(value, direction, step, min, max) {
  const origin = min ?? 0;
  const places = (value - origin) / step;
  const near = Math.round(places);
  const start = Math.abs(places - near) < 1e-6 ? near : direction > 0 ? Math.floor(places) : Math.ceil(places);
  return clamp(Math.round((origin + (start + direction) * step) * 1e6) / 1e6, min, max);
}
