/** The chosen picture or latent frame: where it is, its noise as a number, how it is framed. */
import { html, useId } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model } from "../core/store.js";
import { NumberBox } from "../shell/field.js";
import { Icon } from "../shell/icon.js";
import { openCrop } from "./crop.js";
import { changeItem, movePicture, nextFree, roundNoise, setKeptNoise } from "./edits.js";
import { openFrames } from "./frames.js";
import { removeCard } from "./keys.js";
import { toggle } from "./kept.js";
import { chooseFiles } from "./drop.js";
import { timeOf } from "./model.js";
import { regionOf } from "./pictures.js";
import { apply, chosen, layout, ordered, size } from "./state.js";
import { number, placeName, seconds } from "./words.js";

/** @param {{icon: string, label: string, onClick: () => void, disabled?: boolean, word?: boolean}} props */
function Tool({ icon, label, onClick, disabled = false, word = false }) {
  return html`<button type="button" class=${`button ${word ? "" : "icon"}`} aria-label=${word ? undefined : label} title=${word ? undefined : label} disabled=${disabled} onClick=${onClick}>
    <${Icon} name=${icon} />${word && html`<span>${label}</span>`}
  </button>`;
}

/**
 * Noise as a slider and an exact number.
 * @param {{value: number, onChange: (noise: number|null) => void, label: string}} props
 */
function Noise({ value, onChange, label }) {
  const id = useId();
  const set = (/** @type {number|null} */ noise) => onChange(noise === null ? null : roundNoise(noise));
  return html`<div class="noise-field">
    <label for=${id}>${label}</label>
    <input type="range" min="0" max="1" step="0.05" value=${value} aria-label=${label} onInput=${(/** @type {any} */ event) => onChange(roundNoise(Number(event.currentTarget.value)))} />
    <${NumberBox} id=${id} boxClass="input" value=${value} min=${0} max=${1} step=${0.05} onChange=${set} />
  </div>`;
}

/** @param {{one: import("./model.js").Placed}} props */
function PictureTools({ one }) {
  const { item } = one;
  const shown = /** @type {import("./model.js").Layout} */ (layout.value);
  const { cut } = regionOf(item, size.value.width / size.value.height, form.value.fit);
  const canMove = shown.kind === "images" && one.cell !== null;
  const step = (/** @type {1|-1} */ direction) => {
    const cell = nextFree(form.value, model.value, item.id, direction);
    if (cell !== null) apply(movePicture(form.value, model.value, item.id, cell), `move:${item.id}`);
  };
  const place =
    one.cell === null ? "" : `${seconds(timeOf(one.cell, shown.length))} · ${placeName(one.cell, shown.length)}`;
  return html`
    <p class="inspected"><b>${t("timeline.picture", { number: one.number })}</b><span class="quiet">${place}</span></p>
    ${
      canMove &&
      html`<div class="tools moves">
      <${Tool} icon="left" label=${t("timeline.earlier")} disabled=${nextFree(form.value, model.value, item.id, -1) === null} onClick=${() => step(-1)} />
      <${Tool} icon="right" label=${t("timeline.later")} disabled=${nextFree(form.value, model.value, item.id, 1) === null} onClick=${() => step(1)} />
    </div>`
    }
    <${Noise} key=${item.id} label=${t("timeline.noise")} value=${one.noise} onChange=${(/** @type {number|null} */ noise) => apply(changeItem(form.value, item.id, { noise }), `noise:${item.id}`)} />
    <div class="tools">
      ${item.kind === "video" && html`<${Tool} word icon="film" label=${t("timeline.other_frame")} onClick=${() => openFrames(item, item.frame ?? 0, (frame) => apply(changeItem(form.value, item.id, { frame, crop: null }), ""))} />`}
      ${cut > 0.02 && html`<span class="cut-note">${t(item.crop ? "timeline.cut_more" : "timeline.cut", { percent: number(100 * cut, 0) })}</span>`}
      <${Tool} word icon="crop" label=${t(item.crop ? "timeline.cropped" : "timeline.crop")} onClick=${() => openCrop(item)} />
      <${Tool} icon="trash" label=${t("timeline.remove")} onClick=${() => removeCard(item.id)} />
    </div>
  `;
}

/** @param {{at: number}} props */
function CellTools({ at }) {
  const shown = /** @type {import("./model.js").Layout} */ (layout.value);
  const one = shown.kept.find((other) => other.cell === at);
  return html`
    <p class="inspected"><b>${seconds(timeOf(at, shown.length))}</b><span class="quiet">${placeName(at, shown.length)}</span></p>
    <div class="tools"><${Tool} word icon=${one ? "unlock" : "lock"} label=${t(one ? "timeline.release" : "timeline.keep")} onClick=${() => toggle(at)} /></div>
    ${one && html`<${Noise} key=${at} label=${t("timeline.noise")} value=${one.noise} onChange=${(/** @type {number|null} */ noise) => apply(setKeptNoise(form.value, model.value, at, noise ?? 0), `kept:${at}`)} />`}
  `;
}

/** Below the track: what can be done with what is chosen, else what can be done at all. */
export function Inspector() {
  const shown = layout.value;
  if (!shown) return null;
  const one = shown.pictures.find((other) => other.item.id === chosen.value);
  const at =
    shown.kind === "complete" && chosen.value.startsWith("cell:") && form.value.clips.length
      ? Number(chosen.value.slice(5))
      : null;
  const canAdd = ["image", "images", "text"].includes(shown.kind);
  const what = one
    ? html`<${PictureTools} one=${one} />`
    : at !== null && at < shown.length.count
      ? html`<${CellTools} at=${at} />`
      : html`<p class="quiet timeline-help">${t(`timeline.help.${ordered.value.length || !canAdd ? shown.kind : "none"}`)}</p>`;
  return html`<div class="inspector">
    ${what}
    <span class="inspector-space"></span>
    ${canAdd && html`<${Tool} word icon="plus" label=${t("timeline.add")} onClick=${() => chooseFiles(null)} />`}
  </div>`;
}
