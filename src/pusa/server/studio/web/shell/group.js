/** Choices of which one is taken, as buttons beside one another. */
import { html, useId, useRef } from "../core/dom.js";
import { Icon } from "./icon.js";
import { placeByKey } from "./roving.js";

/**
 * @typedef {object} Option
 * @property {any} value
 * @property {string} label
 * @property {string} [icon]
 * @property {string} [help]  shown when the pointer rests on it
 * @property {boolean} [disabled]
 */

/**
 * One stop of the Tab key; arrow keys choose.
 * @param {object} props
 * @param {string} props.label
 * @param {any} props.value
 * @param {Option[]} props.options
 * @param {(value: any) => void} props.onChange
 * @param {boolean} [props.hidden]  the label is for screen readers only
 * @param {string} [props.help]
 * @param {string} [props.class]
 * @param {"radiogroup"|"tablist"} [props.role]  a list of tabs controls the element of the id `controls`
 * @param {string} [props.controls]
 * @param {string} [props.id]
 */
export function Group({ label, value, options, onChange, hidden = false, help, class: name = "", role = "radiogroup", controls, id }) {
  const own = useId();
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  const isTabs = role === "tablist";
  const chosen = Math.max(0, options.findIndex((option) => option.value === value));
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const open = options.filter((option) => !option.disabled);
    const next = placeByKey(event.key, open.findIndex((option) => option.value === value), open.length);
    if (next === null || !open.length) return;
    event.preventDefault();
    onChange(open[next].value);
    const place = options.indexOf(open[next]);
    /** @type {HTMLElement|undefined} */ (ref.current?.children[place])?.focus();
  };
  return html`<div class=${`choice ${name}`}>
    <span class=${hidden ? "visually-hidden" : "label"} id=${`${own}-label`}>${label}</span>
    <div
      class="group"
      role=${role}
      id=${id}
      aria-labelledby=${`${own}-label`}
      aria-describedby=${help ? `${own}-help` : undefined}
      ref=${ref}
      onKeyDown=${onKeyDown}
    >
      ${options.map(
        (option, place) =>
          html`<button
            type="button"
            key=${String(option.value)}
            role=${isTabs ? "tab" : "radio"}
            id=${isTabs && id ? `${id}-${option.value}` : undefined}
            aria-checked=${isTabs ? undefined : String(option.value === value)}
            aria-selected=${isTabs ? String(option.value === value) : undefined}
            aria-controls=${isTabs ? controls : undefined}
            tabindex=${place === chosen ? 0 : -1}
            disabled=${option.disabled}
            title=${option.help}
            data-value=${String(option.value)}
            onClick=${() => onChange(option.value)}
          >
            ${option.icon && html`<${Icon} name=${option.icon} size=${18} />`}<span>${option.label}</span>
          </button>`,
      )}
    </div>
    ${help && html`<p class="help" id=${`${own}-help`}>${help}</p>`}
  </div>`;
}
