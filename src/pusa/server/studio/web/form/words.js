/** Words that a small model knows: which of a prompt's it does not, and a choice of those that it does. */
import { html } from "../core/dom.js";
import { has, t } from "../core/i18n.js";
import { edit, form, model } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { Icon } from "../shell/icon.js";
import { article, surprise, withPhrase } from "./phrases.js";

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
