/** The stage while nothing is on it: what it is for, and what to do first. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { pageData, ready } from "../core/store.js";

const FRAMES = [1, 0.72, 0.44, 0.2, 0]; // how much grain lies on each

/** @returns {string|null} a picture of an example */
function picture() {
  const example = pageData.examples.find(({ shows }) => shows.some((name) => name.endsWith(".webp")));
  const name = example?.shows.find((one) => one.endsWith(".webp"));
  return name ? String(new URL(`../examples/${name}`, import.meta.url)) : null;
}

export function Welcome() {
  const isLoading = ready.value && !ready.value.ready && ready.value.stage !== "failed";
  const shown = picture();
  return html`<div class="screen words welcome">
    ${shown &&
    html`<div class="welcome-frames" aria-hidden="true">
      ${FRAMES.map((grain, index) => html`<span key=${index} style=${`--grain-part:${grain}`}><img src=${shown} alt="" width="96" height="96" /></span>`)}
    </div>`}
    <p class="words-title">${t("result.welcome")}</p>
    <p class="quiet words-text">${t(isLoading ? "result.welcome_loading" : "result.welcome_text")}</p>
  </div>`;
}
