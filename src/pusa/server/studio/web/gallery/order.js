/** Change the order of a list: its handles are dragged, or moved by the arrow keys. */
import { html, useRef, useState } from "../core/dom.js";
import { Icon } from "../shell/icon.js";
import { moved } from "./model.js";

/**
 * @param {string[]} order  ids
 * @param {(order: string[], id: string) => void} onMove  the new order, and which one was moved
 */
export function useOrder(order, onMove) {
  const [draft, setDraft] = useState(/** @type {string[]|null} */ (null));
  const latest = useRef(order);
  const list = useRef(/** @type {HTMLElement|null} */ (null));
  latest.current = draft ?? order;

  /** @param {string} id @param {PointerEvent} event */
  const drag = (id, event) => {
    const under = document.elementsFromPoint(event.clientX, event.clientY);
    const over = under.map((one) => /** @type {HTMLElement|null} */ (one.closest("[data-order]"))).find((one) => one && list.current?.contains(one));
    const to = over?.dataset.order;
    if (!to || to === id) return;
    const next = moved(latest.current, id, latest.current.indexOf(to));
    latest.current = next;
    setDraft(next);
  };
  const drop = (/** @type {string} */ id) => {
    const next = latest.current;
    setDraft(null);
    if (next.join() !== order.join()) onMove(next, id);
  };
  /** @param {string} id @param {string} label */
  const handle = (id, label) => html`<button
    type="button"
    class="button plain icon order-handle"
    aria-label=${label}
    title=${label}
    onPointerDown=${(/** @type {PointerEvent} */ event) => {
      event.preventDefault();
      const button = /** @type {HTMLElement} */ (event.currentTarget);
      button.focus();
      button.setPointerCapture(event.pointerId);
      setDraft(order);
    }}
    onPointerMove=${(/** @type {PointerEvent} */ event) => draft && drag(id, event)}
    onPointerUp=${() => draft && drop(id)}
    onPointerCancel=${() => setDraft(null)}
    onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const button = /** @type {HTMLElement} */ (event.currentTarget);
      const next = moved(order, id, order.indexOf(id) + by);
      if (next.join() !== order.join()) onMove(next, id);
      requestAnimationFrame(() => button.focus()); // it stands elsewhere now
    }}
  >
    <${Icon} name="drag" size=${18} />
  </button>`;
  return { order: draft ?? order, list, handle, isDragging: draft !== null };
}
