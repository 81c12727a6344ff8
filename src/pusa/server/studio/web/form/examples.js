/** Examples of the open tab: one click fills the form, the play button makes the video. */
import { ApiError } from "../core/api.js";
import { html, useState } from "../core/dom.js";
import { itemOf } from "../core/from_body.js";
import { t, told } from "../core/i18n.js";
import { generate } from "../core/submit.js";
import { amend, edit, emptyForm, form, model, newId, pageData } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { Toolbar } from "../shell/roving.js";
import { toast } from "../shell/toasts.js";
import { sendFrom } from "./files.js";

/** @typedef {import("../core/store.js").pageData["examples"][number]} Example */

/** @param {string} name @returns {string} its address */
const address = (name) => String(new URL(`../examples/${name}`, import.meta.url));

/**
 * Fill the form with an example.
 * @param {any} example
 * @returns {Promise<boolean>} whether its files are there
 */
export async function fill(example) {
  const { noise = null, ...values } = example.values;
  if (!model.value.has_text) values.prompt = ""; // its words mean nothing to this model
  edit((now) => ({ ...emptyForm(), variants: now.variants, tab: example.tab, ...values }));
  try {
    const items = (await sendFrom(example.files.map(address))).map((file) => itemOf(file, null, newId()));
    // Part of the same step of the history: the files arrive a moment after the words.
    amend(example.tab === "video" ? { clips: items } : { items: items.map((item) => ({ ...item, noise })) });
    return true;
  } catch (error) {
    const reason = told("errors", error instanceof ApiError ? error : { code: "connection" });
    toast(t("form.examples.failed", { reason }), { kind: "problem" });
    return false;
  }
}

/** Make an example: fill the form, then send it. @param {any} example */
export async function make(example) {
  if (await fill(example)) await generate();
}

export function Examples() {
  const [busy, setBusy] = useState("");
  const list = pageData.examples.filter((one) => one.tab === form.value.tab && (model.value?.has_text || one.tab !== "text"));
  if (!list.length || !model.value) return html`<div class="examples"></div>`;
  const doing = (/** @type {any} */ example, /** @type {(example: any) => Promise<any>} */ act) => async () => {
    if (busy) return;
    setBusy(example.name);
    await act(example);
    setBusy("");
  };
  return html`<div class="examples">
    <p class="label" id="examples-label">${t("form.examples.title")}</p>
    <${Toolbar} label=${t("form.examples.title")} class="example-strip">
      ${list.map((/** @type {any} */ example) => {
        const { prompt, mode } = example.values;
        return html`<div class=${`example ${busy === example.name ? "busy" : ""}`} key=${example.name} data-example=${example.name}>
          <button type="button" class="example-fill" aria-label=${t("form.examples.fill", { prompt })} title=${prompt} onClick=${doing(example, fill)}>
            <span class="example-shows">${example.shows.map((/** @type {string} */ name, /** @type {number} */ index) => html`<img key=${index} src=${address(name)} alt="" width="44" height="44" loading="lazy" />`)}</span>
            <span class="example-text">${mode && html`<b>${t(`form.mode.${mode}`)}</b> `}<span lang="en">${prompt}</span></span>
          </button>
          <button type="button" class="example-make" aria-label=${t("form.examples.make", { prompt })} title=${t("form.examples.make", { prompt })} onClick=${doing(example, make)}><${Icon} name="play" size=${18} /></button>
        </div>`;
      })}
    <//>
  </div>`;
}
