/** Short messages at the edge of the page, which go away by themselves; each may offer one thing to do. */
import { html, signal } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "./icon.js";

/** @typedef {{id: number, text: string, label?: string, action?: () => void, kind: string, timer: number}} Toast */

/** @type {import("../core/dom.js").Signal<Toast[]>} */
const toasts = signal([]);
let last = 0;
const MOST = 4; // at once
const SECONDS = 6;

/** @param {number} id */
export function dismiss(id) {
  clearTimeout(toasts.value.find((one) => one.id === id)?.timer);
  toasts.value = toasts.value.filter((one) => one.id !== id);
}

/**
 * Show a message.
 * @param {string} text
 * @param {object} [options]
 * @param {() => void} [options.action]  what its button does
 * @param {string} [options.label]  of the button
 * @param {"note"|"problem"} [options.kind]
 * @param {number} [options.seconds]  until it goes
 * @returns {number} its id, for `dismiss`
 */
export function toast(text, { action, label, kind = "note", seconds = action ? 2 * SECONDS : SECONDS } = {}) {
  const id = ++last;
  const timer = window.setTimeout(() => dismiss(id), 1000 * seconds);
  for (const old of toasts.value.slice(0, -MOST + 1)) clearTimeout(old.timer);
  toasts.value = [...toasts.value.slice(-MOST + 1), { id, text, label, action, kind, timer }];
  return id;
}

/** Where the messages are shown; a screen reader says each one. */
export function Toasts() {
  return html`<div class="toasts" role="status" aria-live="polite">
    ${toasts.value.map(
      (one) =>
        html`<div class=${`toast ${one.kind}`} key=${one.id}>
          <span>${one.text}</span>
          ${one.action &&
          html`<button type="button" class="button plain" onClick=${() => (dismiss(one.id), one.action?.())}>${one.label}</button>`}
          <button type="button" class="button plain icon" aria-label=${t("shell.close")} onClick=${() => dismiss(one.id)}>
            <${Icon} name="close" size=${16} />
          </button>
        </div>`,
    )}
  </div>`;
}
