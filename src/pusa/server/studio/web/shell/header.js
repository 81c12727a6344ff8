import { html } from "../core/dom.js";

/** Header */
export function Header() {
  return html`<section class="header"></section>`;
}
