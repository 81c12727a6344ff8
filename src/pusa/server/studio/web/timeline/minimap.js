/** The whole clip in little, where the track is longer than the page is wide: shows and moves what is visible. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { cell, layout, ordered, scrolled, visibleWidth } from "./state.js";

/** @param {{scrollTo: (left: number) => void}} props */
export function Minimap({ scrollTo }) {
  const shown = layout.value;
  if (!shown) return null;
  const { count } = shown.length;
  const total = cell.value * count;
  if (total <= visibleWidth.value + 1) return null;
  const percent = (/** @type {number} */ part) => `${(100 * part).toFixed(3)}%`;
  const go = (/** @type {PointerEvent} */ event) => {
    const box = /** @type {HTMLElement} */ (event.currentTarget);
    const { left, width } = box.getBoundingClientRect();
    scrollTo(((event.clientX - left) / width) * total - visibleWidth.value / 2);
  };
  const onPointerDown = (/** @type {PointerEvent} */ event) => {
    /** @type {HTMLElement} */ (event.currentTarget).setPointerCapture(event.pointerId);
    go(event);
  };
  const steps = /** @type {Record<string, number>} */ ({
    ArrowLeft: -0.25,
    ArrowRight: 0.25,
    PageUp: -1,
    PageDown: 1,
    Home: -Infinity,
    End: Infinity,
  });
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    scrollTo(Math.min(total, Math.max(0, scrolled.value + step * visibleWidth.value)));
  };
  const reach = Math.max(1, total - visibleWidth.value);
  return html`<div
    class="minimap"
    role="scrollbar"
    tabindex="0"
    aria-label=${t("timeline.minimap")}
    aria-controls="timeline-track"
    aria-orientation="horizontal"
    aria-valuemin="0"
    aria-valuemax="100"
    aria-valuenow=${Math.round((100 * scrolled.value) / reach)}
    onPointerDown=${onPointerDown}
    onPointerMove=${(/** @type {PointerEvent} */ event) => event.buttons && go(event)}
    onKeyDown=${onKeyDown}
  >
    ${shown.parts.map((part) => html`<i key=${part.role} class=${`is-${part.role}`} style=${`left:${percent(part.from / count)};width:${percent((part.to - part.from) / count)}`}></i>`)}
    ${shown.kept.map((one) => html`<i key=${one.cell} class="is-kept" style=${`left:${percent(one.cell / count)};width:${percent(1 / count)}`}></i>`)}
    ${ordered.value.map((one) => html`<i key=${one.item.id} class="is-picture" style=${`left:${percent((Number(one.cell) + 0.5) / count)}`}></i>`)}
    <span class="minimap-window" style=${`left:${percent(scrolled.value / total)};width:${percent(visibleWidth.value / total)}`}></span>
  </div>`;
}
