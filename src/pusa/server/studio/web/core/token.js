/** Names that nobody else has. The browser's own `randomUUID` is missing on a page that came over plain HTTP. */

/** @returns {string} 32 hexadecimal digits */
export const token = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** @returns {number} a seed as the server draws one */
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
