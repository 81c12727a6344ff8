/**
 * JSON as the API has it: whole numbers of up to 64 bits, which JavaScript's numbers do not hold. Pure.
 *
 * A number that would lose digits is a text of these digits here, and goes out as the number that it was.
 */

const NUMBERS = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?/g; // and texts, in which digits are left alone
const MAY_LOSE = /\d{16}/;
const SENT = /"seed":"(-?\d+)"/g; // within a text its quotation marks would be escaped

/** @param {string} part @returns {string} */
const exact = (part) => (/^-?\d{16,}$/.test(part) && !Number.isSafeInteger(Number(part)) ? `"${part}"` : part);

/**
 * @param {string} text @returns {any}
 * @throws {SyntaxError}
 */
export const parseJson = (text) => JSON.parse(MAY_LOSE.test(text) ? text.replace(NUMBERS, exact) : text);

/** @param {any} value @returns {string} */
export const jsonText = (value) => JSON.stringify(value).replace(SENT, '"seed":$1');
