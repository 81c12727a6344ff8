/** Prompts of words that a small model knows. Pure. */

/** @param {string} prompt @param {string} phrase @returns {string} the prompt with the phrase behind it */
export function withPhrase(prompt, phrase) {
  const text = prompt.trim();
  if (!text) return phrase;
  return `${text}${/^(the camera|a photo)/.test(phrase) ? ", " : " "}${phrase}`;
}

/** @param {string} prompt @param {string} word @param {string} phrase @returns {string} the prompt with another word */
export function exchanged(prompt, word, phrase) {
  const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return prompt.replace(new RegExp(`(?<![\\p{L}])${escaped}(?![\\p{L}])`, "iu"), () => phrase);
}

/** @param {string} thing */
export const article = (thing) => (/^[aeiou]/.test(thing) ? `an ${thing}` : `a ${thing}`);

/**
 * A prompt of known words.
 * @param {Record<string, string[][]>} words  groups of synonyms by kind @param {() => number} [random]
 */
export function surprise(words, random = Math.random) {
  const any = (/** @type {string} */ kind) => words[kind][Math.floor(random() * words[kind].length)][0];
  const camera = words.cameras && random() < 0.25 ? `, ${any("cameras")}` : "";
  return `${article(any("things"))} ${any("motions")} ${any("places")}${camera}`;
}

