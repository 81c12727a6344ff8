import { html } from "../core/dom.js";

/** Timeline */
export function Timeline() {
  return html`<section class="timeline"></section>`;
}
