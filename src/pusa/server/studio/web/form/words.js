/** Words that a small model knows: which of a prompt's it does not, and a choice of those that it does. Pure parts first. */
import { html } from "../core/dom.js";
import { has, t } from "../core/i18n.js";
import { edit, form, model } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { Icon } from "../shell/icon.js";

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
const article = (thing) => (/^[aeiou]/.test(thing) ? `an ${thing}` : `a ${thing}`);

/**
 * A prompt of known words.
 * @param {Record<string, string[][]>} words  groups of synonyms by kind @param {() => number} [random]
 */
export function surprise(words, random = Math.random) {
  const any = (/** @type {string} */ kind) => words[kind][Math.floor(random() * words[kind].length)][0];
  const camera = words.cameras && random() < 0.25 ? `, ${any("cameras")}` : "";
  return `${article(any("things"))} ${any("motions")} ${any("places")}${camera}`;
}

/** @param {{onClose: () => void}} props */
export function WordsDialog({ onClose }) {
  const words = /** @type {Record<string, string[][]>} */ (model.value.words);
  const canSurprise = words.things && words.motions && words.places;
  const add = (/** @type {string} */ kind, /** @type {string} */ phrase) =>
    edit((now) => ({ prompt: withPhrase(now.prompt, kind === "things" ? article(phrase) : phrase) }));
  const actions = html`${canSurprise &&
    html`<button type="button" class="button" onClick=${() => edit({ prompt: surprise(words) })}><${Icon} name="dice" />${t("form.words.surprise")}</button>`}
    <button type="button" class="button primary" onClick=${onClose}>${t("shell.close")}</button>`;
  return html`<${Dialog} title=${t("form.words.title", { model: model.value.id })} onClose=${onClose} actions=${actions} class="words-dialog">
    <p class="words-prompt" aria-live="polite">${form.value.prompt || t("form.prompt.placeholder")}</p>
    <p class="help">${t("form.words.info")}</p>
    ${Object.entries(words).map(
      ([kind, groups]) => html`<h3 class="label">${has(`form.words.kinds.${kind}`) ? t(`form.words.kinds.${kind}`) : kind}</h3>
        <div class="chips" lang="en">
          ${groups.map(([phrase]) => html`<button type="button" class="chip" key=${phrase} onClick=${() => add(kind, phrase)}>${phrase}</button>`)}
        </div>`,
    )}
  <//>`;
}
