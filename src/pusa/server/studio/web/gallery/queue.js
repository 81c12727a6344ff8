import { html } from "../core/dom.js";

/** Queue */
export function Queue() {
  return html`<section class="queue"></section>`;
}
