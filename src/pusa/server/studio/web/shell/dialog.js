/** Windows over the page. The browser's own `dialog` keeps the focus inside and gives it back. */
import { html, useEffect, useId, useRef } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "./icon.js";

/**
 * @param {object} props
 * @param {string} props.title
 * @param {() => void} props.onClose
 * @param {any} [props.children]
 * @param {any} [props.actions]  buttons below
 * @param {boolean} [props.wide]
 * @param {string} [props.class]
 */
export function Dialog({ title, onClose, children, actions, wide = false, class: name = "" }) {
  const ref = useRef(/** @type {HTMLDialogElement|null} */ (null));
  const id = useId();
  useEffect(() => {
    const dialog = ref.current;
    const before = /** @type {HTMLElement|null} */ (document.activeElement);
    if (dialog && !dialog.open) dialog.showModal();
    return () => {
      dialog?.close();
      if (before?.isConnected) before.focus();
    };
  }, []);
  return html`<dialog
    class=${`dialog ${wide ? "wide" : ""} ${name}`}
    ref=${ref}
    aria-labelledby=${id}
    onCancel=${(/** @type {Event} */ event) => {
      event.preventDefault(); // the state closes it
      onClose();
    }}
    onClick=${(/** @type {MouseEvent} */ event) => event.target === ref.current && onClose()}
  >
    <div class="dialog-inside">
      <header class="dialog-head">
        <h2 id=${id}>${title}</h2>
        <button type="button" class="button plain icon" aria-label=${t("shell.close")} onClick=${onClose}>
          <${Icon} name="close" />
        </button>
      </header>
      <div class="dialog-body">${children}</div>
      ${actions && html`<footer class="dialog-foot">${actions}</footer>`}
    </div>
  </dialog>`;
}
