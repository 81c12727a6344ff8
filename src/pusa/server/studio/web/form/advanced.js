/** Advanced: what is rarely changed. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { standards } from "../core/request.js";
import { edit, form, model } from "../core/store.js";
import { CheckField, SelectField, TextField } from "../shell/field.js";
import { Group } from "../shell/group.js";
import { NumberSlider } from "./fields.js";

/** @param {{name: "fit"|"schedule"|"metadata", choices: readonly string[], value: string}} props */
function Choice({ name, choices, value }) {
  return html`<${Group}
    label=${t(`fields.${name}`)}
    help=${t(`fields.help.${name}`)}
    value=${value}
    options=${choices.map((one) => ({ value: one, label: t(`form.choices.${name}.${one}`) }))}
    onChange=${(/** @type {any} */ one) => edit({ [name]: one })}
    class="wide"
  />`;
}

export function Advanced() {
  if (!model.value) return null;
  const now = form.value;
  const { has_guidance, has_shift, has_waves, loras, metadata } = model.value;
  const standard = standards(now, model.value);
  const choice = now.metadata ?? standard.metadata;
  return html`<div class="fields">
    ${has_guidance &&
    html`<${TextField} id="negative" rows=${2} class="wide" label=${t("fields.negative")} help=${t("fields.help.negative")} value=${now.negative} standard=${standard.negative} maxLength=${10000}
        onChange=${(/** @type {string|null} */ value) => edit({ negative: value }, "negative")} />
      <${NumberSlider} name="guidance" />`}
    ${has_shift && html`<${NumberSlider} name="shift" />`}
    ${(now.tab === "video" || now.story) && html`<${NumberSlider} name="overlap" />`}
    <${NumberSlider} name="fps" />
    ${loras?.length > 0 &&
    html`<${SelectField} id="lora" label=${t("fields.lora")} help=${t("fields.help.lora")} value=${now.lora}
      options=${[{ value: null, label: t("form.lora.none") }, ...loras.map((/** @type {string} */ value) => ({ value, label: value }))]}
      onChange=${(/** @type {string|null} */ value) => edit({ lora: value })} />`}
    ${now.tab !== "text" && html`<${Choice} name="fit" choices=${["crop", "letterbox", "stretch"]} value=${now.fit} />`}
    ${has_waves && html`<${Choice} name="schedule" choices=${["even", "wave"]} value=${now.schedule} />`}
    ${has_guidance &&
    html`<${TextField} id="story" rows=${3} class="wide" label=${t("fields.story")} help=${t("fields.help.story")} placeholder=${t("fields.story_placeholder")} value=${now.story} maxLength=${100000}
      onChange=${(/** @type {string} */ value) => edit({ story: value ?? "" }, "story")} />`}
    <${CheckField} id="exact" class="wide" label=${t("fields.exact")} help=${t("fields.help.exact")} value=${now.exact} onChange=${(/** @type {boolean} */ value) => edit({ exact: value })} />
    ${metadata?.length > 1 && html`<${Choice} name="metadata" choices=${metadata} value=${choice} />`}
  </div>`;
}
