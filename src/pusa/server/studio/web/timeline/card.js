/** A picture on the timeline: drag sideways to move it, its edge of grain or up and down for noise. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form } from "../core/store.js";
import { onCardKey } from "./keys.js";
import { regionOf, regionStyle, stillUrl } from "./pictures.js";
import { onCardDown } from "./pointer.js";
import { cell, chosen, drag, layout, ordered, size } from "./state.js";
import { number, pictureText } from "./words.js";

/**
 * @param {{one: import("./model.js").Placed, place: {x: number, width: number}}} props
 */
export function Card({ one, place }) {
  const { item, noise } = one;
  const at = Number(one.cell);
  const length = /** @type {import("./model.js").Layout} */ (layout.value).length;
  const isChosen = chosen.value === item.id;
  const isTabStop =
    isChosen || (!ordered.value.some((other) => other.item.id === chosen.value) && ordered.value[0] === one);
  const held = drag.value?.id === item.id ? drag.value.what : "";
  const aspect = size.value.width / size.value.height;
  const { cut } = regionOf(item, aspect, form.value.fit);
  const foot = `left:${at * cell.value - place.x}px;width:${cell.value}px`;
  return html`<div
    class=${`card-picture ${isChosen ? "is-chosen" : ""} ${held && `is-held is-held-${held}`} ${place.width < 44 ? "is-narrow" : ""}`}
    style=${`left:${place.x}px;width:${place.width}px;--noise:${noise}`}
    role="slider"
    tabindex=${isTabStop ? 0 : -1}
    aria-label=${t("timeline.card", { number: one.number, name: item.name })}
    aria-orientation="vertical"
    aria-valuemin="0"
    aria-valuemax="1"
    aria-valuenow=${noise}
    aria-valuetext=${pictureText(one, length)}
    data-item=${item.id}
    data-cell=${at}
    onKeyDown=${(/** @type {KeyboardEvent} */ event) => onCardKey(event, one)}
    onFocus=${() => (chosen.value = item.id)}
    onPointerDown=${(/** @type {PointerEvent} */ event) => onCardDown(event, one)}
  >
    <span class="card-face">
      <${Picture} item=${item} width=${320} />
      <span class="grain"></span>
      <span class="noise-handle" data-handle="noise"><span></span></span>
      <span class="card-number">${one.number}</span>
      <span class="card-noise">${number(noise)}</span>
      ${(item.crop || cut > 0.02) && html`<span class=${`card-crop ${item.crop ? "" : "is-automatic"}`} aria-hidden="true"></span>`}
    </span>
    <span class="card-foot" style=${foot}></span>
  </div>`;
}

/**
 * A picture as the video will show it: its region, in a box of the video's shape that fills the space it has.
 * @param {{item: import("../core/store.js").Item, width: number}} props
 */
export function Picture({ item, width }) {
  const aspect = size.value.width / size.value.height;
  const { region } = regionOf(item, aspect, form.value.fit);
  return html`<span class="picture" style=${`--aspect:${aspect}`}>
    <span class="picture-frame"><img src=${stillUrl(item, width)} alt="" draggable=${false} style=${regionStyle(region)} /></span>
  </span>`;
}
