/** Control: how near the video stays to what is given, and how much work it gets. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { edit, editItem, form, model } from "../core/store.js";
import { CheckField, SliderField } from "../shell/field.js";
import { Group } from "../shell/group.js";
import { NumberSlider, noiseItem } from "./fields.js";

const PRESETS = /** @type {const} */ (["faithful", "balanced", "creative"]);

function Noise() {
  const item = noiseItem(form.value);
  if (!item) return null;
  return html`<${SliderField}
    id="noise"
    label=${t("fields.noise")}
    help=${t("fields.help.noise")}
    value=${item.noise}
    standard=${model.value.presets[form.value.preset].noise_multipliers[0]}
    min=${0}
    max=${1}
    step=${0.05}
    onChange=${(/** @type {number|null} */ noise) => editItem(item.id, { noise }, "noise")}
  />`;
}

export function Control() {
  if (!model.value) return null;
  const { preset, fast, draft, tab, mode } = form.value;
  const hasDraft = tab !== "video" || mode === "complete" || mode === "extend";
  return html`<div class="fields">
    <${Group}
      label=${t("fields.preset")}
      value=${preset}
      options=${PRESETS.map((value) => ({ value, label: t(`form.presets.${value}`) }))}
      onChange=${(/** @type {any} */ value) => edit({ preset: value })}
      help=${t("fields.help.preset")}
      class="wide"
    />
    <${Noise} />
    <${NumberSlider} name="alpha" />
    ${model.value.experts === 2 && html`<${NumberSlider} name="alpha2" />`}
    <${NumberSlider} name="steps" />
    ${model.value.fast &&
    html`<${CheckField} id="fast" label=${t("fields.fast")} help=${t("fields.help.fast")} value=${fast} onChange=${(/** @type {boolean} */ value) => edit({ fast: value })} />`}
    ${hasDraft &&
    html`<${CheckField} id="draft" label=${t("fields.draft")} help=${t("fields.help.draft")} value=${draft} onChange=${(/** @type {boolean} */ value) => edit({ draft: value })} />`}
  </div>`;
}
