/** The prompt, with help beside it: prompts that were used, words that the model knows, an enhancer and a translator. */
import { post } from "../core/api.js";
import { html, signal, useEffect, useState } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { forgetPrompts, promptHistory } from "../core/prompts.js";
import { edit, form, model } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { TextField } from "../shell/field.js";
import { Icon } from "../shell/icon.js";
import { Toolbar } from "../shell/roving.js";
import { toast } from "../shell/toasts.js";
import { exchanged } from "./phrases.js";
import { WordsDialog } from "./words.js";

const WAIT_MS = 400;
const MOST_HINTS = 3;

/** What the server says of the prompt: {prompt, unknown_words, lost, limit}. */
const checked = signal(/** @type {any} */ (null));

/** A text that the enhancer or the translator made, before it is used; "" while it is being made. */
const suggestion = signal(/** @type {string|null} */ (null));

/** @param {"enhance"|"translate"} what */
async function suggest(what) {
  suggestion.value = "";
  try {
    suggestion.value = (await post("/v1/prompts/enhance", { prompt: form.value.prompt, do: what })).prompt;
  } catch (error) {
    suggestion.value = null;
    toast(told("errors", /** @type {any} */ (error)), { kind: "problem" });
  }
}

/** @param {{onClose: () => void}} props */
function HistoryDialog({ onClose }) {
  const list = promptHistory.value;
  const use = (/** @type {string} */ prompt) => {
    edit({ prompt });
    onClose();
  };
  const actions = list.length ? html`<button type="button" class="button danger" onClick=${forgetPrompts}>${t("form.history.clear")}</button>` : null;
  return html`<${Dialog} title=${t("form.history.title")} onClose=${onClose} actions=${actions}>
    ${list.length
      ? html`<ul class="prompt-list">${list.map((prompt) => html`<li key=${prompt}><button type="button" onClick=${() => use(prompt)}>${prompt}</button></li>`)}</ul>`
      : html`<p class="quiet">${t("form.history.empty")}</p>`}
  <//>`;
}

/** @param {{name: string, icon: string, act: () => void, disabled?: boolean}} props */
const Tool = ({ name, icon, act, disabled }) =>
  html`<button type="button" class="button plain icon" aria-label=${name} title=${name} disabled=${disabled} onClick=${act}><${Icon} name=${icon} size=${18} /></button>`;

function Tools() {
  const [open, setOpen] = useState("");
  const close = () => setOpen("");
  const hasWords = Object.keys(model.value?.words ?? {}).length > 0;
  const isEmpty = !form.value.prompt.trim();
  return html`<${Toolbar} label=${t("form.prompt.tools")} class="prompt-tools">
      <${Tool} name=${t("form.history.title")} icon="history" act=${() => setOpen("history")} />
      ${hasWords && html`<${Tool} name=${t("form.words.title", { model: model.value.id })} icon="words" act=${() => setOpen("words")} />`}
      ${model.value?.enhancer &&
      html`<${Tool} name=${t("form.prompt.enhance")} icon="wand" disabled=${isEmpty} act=${() => suggest("enhance")} />
        <${Tool} name=${t("form.prompt.translate")} icon="translate" disabled=${isEmpty} act=${() => suggest("translate")} />`}
    <//>
    ${open === "history" && html`<${HistoryDialog} onClose=${close} />`}
    ${open === "words" && html`<${WordsDialog} onClose=${close} />`}`;
}

export function Prompt() {
  const { prompt } = form.value;
  const classes = model.value?.classes;
  if (classes === 0) return null;
  const placeholder = t(classes ? "form.prompt.class_placeholder" : "form.prompt.placeholder");
  return html`<${TextField} id="prompt" class="prompt" rows=${3} label=${t("form.prompt.label")} value=${prompt} placeholder=${placeholder} maxLength=${10000}
    aside=${html`<${Tools} />`} onChange=${(/** @type {string} */ text) => edit({ prompt: text }, "prompt")} />`;
}

/** Ask what the model understands of the prompt, once nobody types. */
function useCheck() {
  const { prompt } = form.value;
  const canAsk = Boolean(model.value?.has_text && prompt.trim());
  useEffect(() => {
    if (!canAsk) return void (checked.value = null);
    const stop = new AbortController();
    const timer = setTimeout(async () => {
      try {
        checked.value = { prompt, ...(await post("/v1/prompts/check", { prompt }, { signal: stop.signal })) };
      } catch {
        if (!stop.signal.aborted) checked.value = null; // a hint only: what is sent is checked again
      }
    }, WAIT_MS);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [prompt, canAsk]);
}

/** @param {{found: any}} props */
function Unknown({ found }) {
  const swap = (/** @type {string} */ phrase) => edit((now) => ({ prompt: exchanged(now.prompt, found.word, phrase) }));
  return html`<p class="prompt-hint">
    ${t("form.words.unknown", { model: model.value.id, word: found.word })}
    ${found.nearest?.length > 0 &&
    html` ${t("form.words.nearest")} ${found.nearest.map((/** @type {string} */ phrase) => html`<button type="button" class="chip" key=${phrase} lang="en" onClick=${() => swap(phrase)}>${phrase}</button>`)}`}
  </p>`;
}

function Suggestion() {
  const text = suggestion.value;
  if (text === null) return null;
  const close = () => (suggestion.value = null);
  const use = () => {
    edit({ prompt: text });
    close();
  };
  return html`<div class="suggestion" role="status">
    <span class="label">${t("form.prompt.suggestion")}</span>
    <p>${text || t("form.prompt.asking")}</p>
    ${text &&
    html`<div class="suggestion-acts">
      <button type="button" class="button primary" onClick=${use}>${t("form.prompt.use")}</button>
      <button type="button" class="button" onClick=${close}>${t("form.prompt.dismiss")}</button>
    </div>`}
  </div>`;
}

/** What stands under the prompt: unknown words, a text that is too long, a suggestion. */
export function PromptHints() {
  useCheck();
  const found = checked.value?.prompt === form.value.prompt ? checked.value : null;
  const unknown = (found?.unknown_words ?? []).slice(0, MOST_HINTS);
  if (!unknown.length && !found?.lost && suggestion.value === null) return null;
  return html`<div class="hints">
    <div role="status">
      ${unknown.map((/** @type {any} */ one) => html`<${Unknown} key=${one.word} found=${one} />`)}
      ${found?.lost && html`<p class="prompt-hint">${t("form.prompt.lost", { lost: String(found.lost).slice(0, 80), limit: found.limit })}</p>`}
    </div>
    <${Suggestion} />
  </div>`;
}
