import { html } from "../core/dom.js";

/** Stage */
export function Stage() {
  return html`<section class="stage"></section>`;
}
