import { html } from "../core/dom.js";

/** Gallery */
export function Gallery() {
  return html`<section class="gallery"></section>`;
}
