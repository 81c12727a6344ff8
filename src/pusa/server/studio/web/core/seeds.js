/** Seeds: whole numbers of 63 bits. Those beyond JavaScript's numbers are texts of their digits, as in core/json.js. Pure. */

/** @typedef {number|string} Seed */

const COUNT = 2n ** 63n;

/** The largest one, as text. */
export const MOST_SEED = String(COUNT - 1n);

/** @param {bigint} value @returns {Seed} */
const seedOf = (value) => (value <= Number.MAX_SAFE_INTEGER ? Number(value) : String(value));

/**
 * Read a seed that somebody wrote; null if it is none.
 * @param {string} text
 * @returns {{seed: Seed, isTooLarge: boolean}|null}  the largest one in the place of what is too large
 */
export function readSeed(text) {
  const digits = text.trim();
  if (!/^\+?\d{1,100}$/.test(digits)) return null;
  const value = BigInt(digits.replace("+", ""));
  const isTooLarge = value >= COUNT;
  return { seed: seedOf(isTooLarge ? COUNT - 1n : value), isTooLarge };
}

/** The seed so many further on; after the largest one comes 0. @param {Seed} seed @param {number} by @returns {Seed} */
export const seedAfter = (seed, by) => seedOf((BigInt(seed) + BigInt(by) + COUNT) % COUNT);
