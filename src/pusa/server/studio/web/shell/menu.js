/** A button that opens a list of things to do. */
import { html, useEffect, useId, useRef, useState } from "../core/dom.js";
import { Icon } from "./icon.js";
import { placeByKey } from "./roving.js";

/**
 * @typedef {object} Entry
 * @property {string} label
 * @property {() => void} act
 * @property {string} [icon]
 * @property {boolean} [checked]  one of several choices: whether it is taken
 * @property {boolean} [danger]
 * @property {boolean} [disabled]
 */

/**
 * @param {object} props
 * @param {string} props.label  of the button
 * @param {Entry[]} props.entries
 * @param {string} [props.icon]
 * @param {boolean} [props.wordless]  the button shows only its pictogram
 * @param {string} [props.class]  of the button
 * @param {"start"|"end"} [props.side]  which side of the button and the list meet
 * @param {number} [props.stop]  the button's tabindex, in a group that has its own arrow keys
 */
export function Menu({ label, entries, icon = "more", wordless = true, class: name = "button plain", side = "end", stop }) {
  const [open, setOpen] = useState(false);
  const id = useId();
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  const items = () => /** @type {HTMLElement[]} */ ([...(ref.current?.querySelectorAll('[role^="menuitem"]') ?? [])]);
  const button = () => /** @type {HTMLElement|null} */ (ref.current?.querySelector("button"));
  useEffect(() => {
    if (!open) return;
    const all = items();
    (all.find((one) => one.getAttribute("aria-checked") === "true") ?? all[0])?.focus();
    const outside = (/** @type {Event} */ event) => {
      if (!ref.current?.contains(/** @type {Node} */ (event.target))) setOpen(false);
    };
    document.addEventListener("pointerdown", outside);
    document.addEventListener("focusin", outside);
    return () => {
      document.removeEventListener("pointerdown", outside);
      document.removeEventListener("focusin", outside);
    };
  }, [open]);
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    if (!open) {
      if (event.key === "ArrowDown") (event.preventDefault(), event.stopPropagation(), setOpen(true));
      return;
    }
    event.stopPropagation();
    if (event.key === "Escape") {
      event.preventDefault();
      setOpen(false);
      return button()?.focus();
    }
    if (event.key === "Tab") return setOpen(false);
    const all = items();
    const next = placeByKey(event.key, all.indexOf(/** @type {any} */ (document.activeElement)), all.length);
    if (next === null) return;
    event.preventDefault();
    all[next].focus();
  };
  const choose = (/** @type {Entry} */ entry) => {
    setOpen(false);
    button()?.focus();
    entry.act();
  };
  return html`<div class="menu" ref=${ref} onKeyDown=${onKeyDown}>
    <button
      type="button"
      class=${wordless ? `${name} icon` : name}
      tabindex=${stop}
      aria-haspopup="menu"
      aria-expanded=${String(open)}
      aria-controls=${open ? id : undefined}
      aria-label=${wordless ? label : undefined}
      title=${wordless ? label : undefined}
      onClick=${() => setOpen(!open)}
    >
      <${Icon} name=${icon} />${wordless ? null : html`<span>${label}</span>`}
    </button>
    ${open &&
    html`<div class=${`menu-list ${side}`} role="menu" id=${id} aria-label=${label}>
      ${entries.map(
        (entry) =>
          html`<button
            type="button"
            key=${entry.label}
            role=${entry.checked === undefined ? "menuitem" : "menuitemradio"}
            aria-checked=${entry.checked === undefined ? undefined : String(entry.checked)}
            tabindex="-1"
            class=${entry.danger ? "danger" : ""}
            disabled=${entry.disabled}
            onClick=${() => choose(entry)}
          >
            ${entry.checked !== undefined
              ? html`<span class="tick">${entry.checked && html`<${Icon} name="check" size=${16} />`}</span>`
              : entry.icon && html`<${Icon} name=${entry.icon} size=${18} />`}
            <span>${entry.label}</span>
          </button>`,
      )}
    </div>`}
  </div>`;
}
