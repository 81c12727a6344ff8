import { html } from "../core/dom.js";

/** Form */
export function Form() {
  return html`<section class="form"></section>`;
}
