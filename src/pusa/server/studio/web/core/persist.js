/** The browser's storage, which can be full, switched off or hold another program's text: the page works without it. */

/** What was last written, for a browser that keeps nothing: it lasts as long as the page. @type {Map<string, string>} */
const memory = new Map();

/** @param {string} key @returns {string|null} */
function raw(key) {
  try {
    return localStorage.getItem(key) ?? memory.get(key) ?? null;
  } catch {
    return memory.get(key) ?? null; // storage is switched off
  }
}

/**
 * Read a JSON value.
 * @template T
 * @param {string} key @param {T} fallback  where nothing that can be read is stored
 * @returns {T}
 */
export function read(key, fallback) {
  try {
    return JSON.parse(raw(key) ?? "null") ?? fallback;
  } catch {
    return fallback; // cut off, or another program's
  }
}

/**
 * Write a JSON value.
 * @param {string} key @param {any} value  undefined or null: remove it
 * @returns {boolean} whether it will still be there after the page is closed
 */
export function write(key, value) {
  const text = value === undefined || value === null ? null : JSON.stringify(value);
  if (text === null) memory.delete(key);
  else memory.set(key, text);
  try {
    if (text === null) localStorage.removeItem(key);
    else localStorage.setItem(key, text);
    return true;
  } catch {
    return false; // full, or switched off
  }
}
