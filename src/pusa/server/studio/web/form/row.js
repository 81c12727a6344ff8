/** The row above Generate: shape, seconds, variants, seed. */
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { nearestOf } from "../core/positions.js";
import { standards } from "../core/request.js";
import { parseSize, shapeGiver, targetSize } from "../core/size.js";
import { edit, form, model } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { NumberField, SelectField } from "../shell/field.js";
import { Seed } from "./seed.js";

const MOST_VARIANTS = 8;
const written = (/** @type {string} */ size) => size.replace("x", " × ");

function autoName() {
  const giver = shapeGiver(form.value);
  if (form.value.tab === "text" || (form.value.tab === "video" && form.value.mode === "loop" && !giver)) return t("form.row.auto_text");
  return t(form.value.tab === "video" && form.value.mode !== "loop" ? "form.row.auto_video" : "form.row.auto_image");
}

/** @param {{onClose: () => void}} props */
function CustomSize({ onClose }) {
  const [size, setSize] = useState(() => targetSize(form.value, model.value));
  const multiple = model.value.size_multiple;
  const side = (/** @type {"width"|"height"} */ name) => {
    const found = model.value.fields?.[name] ?? {};
    return html`<${NumberField} label=${t(`fields.${name}`)} value=${size[name]} min=${multiple} max=${found.maximum ?? 2048} step=${multiple} whole unit="px"
      onChange=${(/** @type {number|null} */ value) => setSize({ ...size, [name]: value ?? model.value.defaults[name] })} />`;
  };
  const use = () => {
    edit({ shape: `${nearestOf(size.width, multiple)}x${nearestOf(size.height, multiple)}` });
    onClose();
  };
  return html`<${Dialog} title=${t("form.row.custom")} onClose=${onClose}
    actions=${html`<button type="button" class="button" onClick=${onClose}>${t("shell.cancel")}</button><button type="button" class="button primary" onClick=${use}>${t("form.saved.use")}</button>`}>
    <div class="pair">${side("width")}${side("height")}</div>
    <p class="help">${t("fields.help.size", { multiple })}</p>
  <//>`;
}

function Shape() {
  const [custom, setCustom] = useState(false);
  const { shape } = form.value;
  const { shapes = {}, sizes = [] } = model.value;
  const own = parseSize(shape) && !sizes.includes(shape) ? [shape] : [];
  const size = targetSize(form.value, model.value);
  const options = [
    { value: "auto", label: autoName() },
    ...Object.keys(shapes).map((value) => ({ value, label: value, group: t("form.row.shapes") })),
    ...[...sizes, ...own].map((value) => ({ value, label: written(value), group: t("form.row.sizes") })),
    { value: "custom", label: t("form.row.custom"), group: t("form.row.sizes") },
  ];
  const choose = (/** @type {string} */ value) => (value === "custom" ? setCustom(true) : edit({ shape: value }));
  return html`<${SelectField} id="shape" label=${t("form.row.shape")} value=${shape} options=${options} onChange=${choose}
      aside=${html`<span class="quiet small number">${size.width} × ${size.height}</span>`} />
    ${custom && html`<${CustomSize} onClose=${() => setCustom(false)} />`}`;
}

function Seconds() {
  const standard = standards(form.value, model.value);
  const fps = form.value.fps ?? standard.fps;
  const factor = model.value.frames_per_latent;
  const most = model.value.limits?.frames ?? 4801;
  const frames = nearestOf(form.value.frames ?? standard.frames, factor, 1);
  const set = (/** @type {number|null} */ seconds) =>
    edit({ frames: seconds === null ? null : Math.min(most, Math.max(factor + 1, nearestOf(Math.round(seconds * fps), factor, 1))) }, "frames");
  return html`<${NumberField} id="seconds" label=${t("form.row.seconds")} value=${frames / fps} standard=${nearestOf(standard.frames, factor, 1) / fps}
    min=${(factor + 1) / fps} max=${most / fps} step=${factor / fps} digits=${2} onChange=${set}
    aside=${html`<span class="quiet small number" title=${t("form.row.frames", { frames })}>${t("form.row.frames", { frames })}</span>`} />`;
}

export function Row() {
  if (!model.value) return html`<div class="row"></div>`;
  const variants = Array.from({ length: MOST_VARIANTS }, (_, number) => ({ value: number + 1, label: String(number + 1) }));
  return html`<div class="row">
    <${Shape} /><${Seconds} />
    <${SelectField} id="variants" label=${t("form.row.variants")} value=${form.value.variants} options=${variants} onChange=${(/** @type {number} */ value) => edit({ variants: value })} />
    <${Seed} />
  </div>`;
}
