/** The timeline across the page: pictures and clips over time, as they will be made. */
import { html, useEffect, useRef } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { Clips } from "./clips.js";
import { CropDialog } from "./crop.js";
import { onDragLeave, onDragOver, onDrop } from "./drop.js";
import { changeItem } from "./edits.js";
import { Texts, problemText } from "./fields.js";
import { FramesDialog } from "./frames.js";
import { Inspector } from "./inspector.js";
import { Minimap } from "./minimap.js";
import { LEAST_CELL, MOST_CELL } from "./scale.js";
import { apply, cell, layout, scrolled, visibleWidth, zoom } from "./state.js";
import { Track, summary } from "./track.js";

const STEP = 1.5; // of the zoom buttons

/** @param {HTMLElement|null} scroller @param {number} to pixels of a cell; below what fits: all of it @param {number} [clientX] the point that stays */
function zoomTo(scroller, to, clientX) {
  const count = layout.value?.length.count ?? 1;
  if (!scroller) return;
  const left = scroller.getBoundingClientRect().left;
  const anchor = (clientX ?? left + scroller.clientWidth / 2) - left;
  const at = (scroller.scrollLeft + anchor) / cell.value;
  const fit = Math.max(LEAST_CELL, visibleWidth.value / count);
  zoom.value = to <= fit ? null : Math.min(MOST_CELL, to);
  requestAnimationFrame(() => (scroller.scrollLeft = at * cell.value - anchor));
}

/** Zoom by Ctrl and wheel, and by two fingers; everything else scrolls as usual. @param {HTMLElement} scroller */
function listen(scroller) {
  const onWheel = (/** @type {WheelEvent} */ event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoomTo(scroller, cell.value * Math.exp(-event.deltaY / 240), event.clientX);
  };
  let start = { distance: 0, cell: 0 };
  const apart = (/** @type {TouchList} */ touches) =>
    Math.hypot(touches[0].clientX - touches[1].clientX, touches[0].clientY - touches[1].clientY);
  const onTouchStart = (/** @type {TouchEvent} */ event) => {
    if (event.touches.length === 2) start = { distance: apart(event.touches), cell: cell.value };
  };
  const onTouchMove = (/** @type {TouchEvent} */ event) => {
    if (event.touches.length !== 2 || !start.distance) return;
    event.preventDefault();
    const middle = (event.touches[0].clientX + event.touches[1].clientX) / 2;
    zoomTo(scroller, (start.cell * apart(event.touches)) / start.distance, middle);
  };
  const measure = new ResizeObserver(() => (visibleWidth.value = scroller.clientWidth - 2 * PADDING));
  measure.observe(scroller);
  scroller.addEventListener("wheel", onWheel, { passive: false });
  scroller.addEventListener("touchstart", onTouchStart, { passive: true });
  scroller.addEventListener("touchmove", onTouchMove, { passive: false });
  return () => {
    measure.disconnect();
    scroller.removeEventListener("wheel", onWheel);
    scroller.removeEventListener("touchstart", onTouchStart);
    scroller.removeEventListener("touchmove", onTouchMove);
  };
}

const PADDING = 20; // beside the track; timeline.css has the same

/** What is wrong, with what would repair it. */
function Problems() {
  const shown = layout.value;
  if (!shown?.problems.length) return null;
  const isEndFree = !shown.pictures.some((one) => one.cell === shown.length.count - 1);
  return html`<div class="timeline-problems" role="status"><ul>
    ${shown.problems.map(
      (problem, number) => html`<li key=${number} class="field-problem">
        ${problemText(/** @type {any} */ (problem))}
        ${
          problem.id &&
          html`<span class="tools">
          ${problem.code === "outside" && isEndFree && html`<button type="button" class="button small" onClick=${() => apply(changeItem(form.value, String(problem.id), { position: "last" }), "")}>${t("timeline.use_last")}</button>`}
          ${problem.code !== "no_room" && html`<button type="button" class="button small" onClick=${() => apply(changeItem(form.value, String(problem.id), { position: null }), "")}>${t("timeline.place_free")}</button>`}
        </span>`
        }
      </li>`,
    )}
  </ul></div>`;
}

/** @param {{scroller: import("../core/dom.js").RefObject<HTMLElement>}} props */
function Zoom({ scroller }) {
  const shown = layout.value;
  const fits = shown ? cell.value * shown.length.count <= visibleWidth.value + 1 : true;
  return html`<div class="zoom" role="group" aria-label=${t("timeline.zoom")}>
    <button type="button" class="button plain icon" aria-label=${t("timeline.zoom_out")} title=${t("timeline.zoom_out")} disabled=${fits || zoom.value === null} onClick=${() => zoomTo(scroller.current, cell.value / STEP)}><${Icon} name="zoom-out" /></button>
    <button type="button" class="button plain icon" aria-label=${t("timeline.zoom_fit")} title=${t("timeline.zoom_fit")} disabled=${zoom.value === null} onClick=${() => (zoom.value = null)}><${Icon} name="fit" /></button>
    <button type="button" class="button plain icon" aria-label=${t("timeline.zoom_in")} title=${t("timeline.zoom_in")} disabled=${cell.value >= MOST_CELL} onClick=${() => zoomTo(scroller.current, cell.value * STEP)}><${Icon} name="zoom-in" /></button>
  </div>`;
}

/** The timeline. */
export function Timeline() {
  const scroller = useRef(/** @type {HTMLElement|null} */ (null));
  useEffect(() => (scroller.current ? listen(scroller.current) : undefined), []);
  const scrollTo = (/** @type {number} */ left) => scroller.current?.scrollTo({ left });
  return html`<section class="timeline card" id="timeline-track" aria-labelledby="timeline-title" aria-busy=${!model.value} onDragOver=${onDragOver} onDragLeave=${onDragLeave} onDrop=${onDrop}>
    <header class="timeline-head">
      <h2 id="timeline-title">${t("timeline.title")}</h2>
      <p class="timeline-summary quiet number">${summary()}</p>
      <${Texts} />
      <${Zoom} scroller=${scroller} />
    </header>
    <${Clips} />
    <div class="timeline-scroll" ref=${scroller} onScroll=${(/** @type {any} */ event) => (scrolled.value = event.currentTarget.scrollLeft)}>
      <${Track} />
    </div>
    <${Minimap} scrollTo=${scrollTo} />
    <${Problems} />
    <${Inspector} />
    <${CropDialog} />
    <${FramesDialog} />
  </section>`;
}
