/** Arrow keys inside a group of buttons that is one stop of the Tab key. */
import { html, useEffect, useRef } from "../core/dom.js";

/**
 * The place to go to in a list, by a key; null for other keys.
 * @param {string} key  of a keyboard event
 * @param {number} index  the place now
 * @param {number} count
 * @param {boolean} [reversed]  the page is read from right to left
 * @returns {number|null}
 */
export function placeByKey(key, index, count, reversed = false) {
  const step = reversed ? -1 : 1;
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  if (key === "ArrowRight") return (index + step + count) % count;
  if (key === "ArrowLeft") return (index - step + count) % count;
  if (key === "ArrowDown") return (index + 1) % count;
  if (key === "ArrowUp") return (index - 1 + count) % count;
  return null;
}

/** @param {HTMLElement} element @returns {HTMLElement[]} */
const buttonsIn = (element) =>
  /** @type {HTMLElement[]} */ ([...element.querySelectorAll("button, a[href], summary")]).filter(
    (one) => !(/** @type {HTMLButtonElement} */ (one).disabled) && one.offsetParent !== null,
  );

/**
 * Buttons in a row: one stop of the Tab key, arrow keys go between them.
 * @param {{label: string, class?: string, children?: any}} props
 */
export function Toolbar({ label, children, class: name = "" }) {
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  useEffect(() => {
    const all = ref.current ? buttonsIn(ref.current) : [];
    const stop = all.find((one) => one.tabIndex === 0 && one === document.activeElement) ?? all[0];
    for (const one of ref.current?.querySelectorAll("button, a[href]") ?? []) {
      /** @type {HTMLElement} */ (one).tabIndex = one === stop ? 0 : -1;
    }
  });
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const all = ref.current ? buttonsIn(ref.current) : [];
    const index = all.indexOf(/** @type {HTMLElement} */ (document.activeElement));
    if (index < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const next = placeByKey(event.key, index, all.length);
    if (next === null) return;
    event.preventDefault();
    all.forEach((one, place) => (one.tabIndex = place === next ? 0 : -1));
    all[next].focus();
  };
  return html`<div class=${`toolbar ${name}`} role="toolbar" aria-label=${label} ref=${ref} onKeyDown=${onKeyDown}>
    ${children}
  </div>`;
}
