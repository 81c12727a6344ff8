/** Frame a picture or a clip by hand, in the shape of the video. */
import { html, signal, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { changeItem } from "./edits.js";
import { frameUrl, middleRegion, stillUrl } from "./pictures.js";
import { cropBox, moveCrop, scaleCrop, scaleOf } from "./framing.js";
import { apply, size } from "./state.js";
import { number } from "./words.js";

/** @typedef {import("../core/store.js").Item} Item */
/** @typedef {import("./pictures.js").Region} Region */

const opened = signal(/** @type {string|null} */ (null));
const CORNERS = /** @type {const} */ (["nw", "ne", "sw", "se"]);

/** Let the visitor frame a picture or a clip of the form. @param {Item} item */
export function openCrop(item) {
  opened.value = item.id;
}

/** @param {{item: Item}} props */
function Framing({ item }) {
  const aspect = size.value.width / size.value.height;
  const whole = middleRegion(item, aspect);
  const [region, setRegion] = useState(/** @type {Region} */ (item.crop ? cropBox(item.crop, whole) : whole));
  const view = useRef(/** @type {HTMLElement|null} */ (null));
  const scale = scaleOf(region, whole);
  const close = () => (opened.value = null);
  const done = (/** @type {Region|null} */ crop) => {
    close();
    apply(changeItem(form.value, item.id, { crop }), "");
  };
  const onPointerDown = (/** @type {PointerEvent} */ event) => {
    const box = view.current?.getBoundingClientRect();
    if (event.button || !box) return;
    const target = /** @type {HTMLElement} */ (event.currentTarget);
    const corner = /** @type {HTMLElement} */ (event.target).dataset.corner;
    const from = { x: event.clientX, y: event.clientY, region };
    target.setPointerCapture(event.pointerId);
    const onMove = (/** @type {PointerEvent} */ now) => {
      const x = (now.clientX - from.x) / box.width;
      const y = (now.clientY - from.y) / box.height;
      if (!corner) return setRegion(moveCrop(from.region, x, y));
      const wider = (corner.includes("e") ? x : -x) / from.region[2];
      const higher = (corner.includes("s") ? y : -y) / from.region[3];
      const factor = 1 + (Math.abs(wider) > Math.abs(higher) ? wider : higher);
      setRegion(scaleCrop(from.region, factor, whole, corner));
    };
    const onUp = () => {
      target.removeEventListener("pointermove", onMove);
      target.removeEventListener("pointerup", onUp);
      target.removeEventListener("pointercancel", onUp);
    };
    target.addEventListener("pointermove", onMove);
    target.addEventListener("pointerup", onUp);
    target.addEventListener("pointercancel", onUp);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const by = event.shiftKey ? 0.1 : 0.01;
    /** @type {Record<string, () => Region>} */
    const actions = {
      ArrowLeft: () => moveCrop(region, -by, 0),
      ArrowRight: () => moveCrop(region, by, 0),
      ArrowUp: () => moveCrop(region, 0, -by),
      ArrowDown: () => moveCrop(region, 0, by),
      "+": () => scaleCrop(region, 1.05, whole, ""),
      "=": () => scaleCrop(region, 1.05, whole, ""),
      "-": () => scaleCrop(region, 1 / 1.05, whole, ""),
      PageUp: () => scaleCrop(region, 1.2, whole, ""),
      PageDown: () => scaleCrop(region, 1 / 1.2, whole, ""),
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    setRegion(actions[event.key]());
  };
  const place = (/** @type {number} */ part) => `${(100 * part).toFixed(3)}%`;
  const [x, y, width, height] = region;
  const isAutomatic = region.every((value, index) => Math.abs(value - whole[index]) < 0.001);
  const text = t("timeline.crop_text", {
    percent: number(100 * scale, 0),
    left: number(100 * x, 0),
    top: number(100 * y, 0),
  });
  const still =
    item.kind === "video" && item.frame === null
      ? frameUrl(item, { time: item.start ?? 0, width: 1024 })
      : stillUrl(item, 1024);
  const actions = html`<button type="button" class="button" disabled=${!item.crop && isAutomatic} onClick=${() => done(null)}>${t("timeline.crop_automatic")}</button>
    <button type="button" class="button primary" onClick=${() => done(region)}>${t("timeline.crop_use")}</button>`;
  return html`<${Dialog} title=${t("timeline.crop_title")} onClose=${close} actions=${actions} wide class="crop-dialog">
    <p class="quiet">${t("timeline.crop_help", { width: size.value.width, height: size.value.height })}</p>
    <div class="crop-view" ref=${view} style=${`--aspect:${item.width / item.height}`}>
      <img src=${still} alt=${item.name} draggable=${false} />
      <div
        class="crop-box"
        style=${`left:${place(x)};top:${place(y)};width:${place(width)};height:${place(height)}`}
        role="slider"
        tabindex="0"
        autofocus
        aria-label=${t("timeline.crop_frame")}
        aria-valuemin="10"
        aria-valuemax="100"
        aria-valuenow=${Math.round(100 * scale)}
        aria-valuetext=${text}
        onPointerDown=${onPointerDown}
        onKeyDown=${onKeyDown}
      >
        <i></i><i></i>${CORNERS.map((corner) => html`<b key=${corner} class=${corner} data-corner=${corner}></b>`)}
      </div>
    </div>
    <label class="crop-scale">
      <span>${t("timeline.crop_size")}</span>
      <input type="range" min="0.1" max="1" step="0.01" value=${scale} onInput=${(/** @type {any} */ event) => setRegion(scaleCrop(region, Number(event.currentTarget.value) / scale, whole, ""))} />
      <output class="number">${number(100 * scale, 0)} %</output>
    </label>
  <//>`;
}

export function CropDialog() {
  const { items, clips } = form.value;
  const item = opened.value === null ? null : [...items, ...clips].find((one) => one.id === opened.value);
  return item ? html`<${Framing} key=${item.id} item=${item} />` : null;
}
