/** What the fields under Control and Advanced have in common: which there are, ranges and defaults of the model. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { standards } from "../core/request.js";
import { edit, emptyForm, form, model } from "../core/store.js";
import { SliderField } from "../shell/field.js";

/** @typedef {import("../core/store.js").Form} Form */

/** Names of numbers in the form and in the API. */
const API_NAMES = /** @type {const} */ ({
  steps: "num_inference_steps",
  guidance: "guidance_scale",
  shift: "flow_shift",
  alpha: "lora_alpha",
  alpha2: "lora_alpha_2",
  overlap: "overlap",
  fps: "fps",
});

/** The fields under each button. */
const FIELDS = /** @type {const} */ ({
  control: ["preset", "alpha", "alpha2", "steps", "fast", "draft"],
  advanced: ["negative", "guidance", "shift", "overlap", "fps", "fit", "exact", "schedule", "story", "metadata", "lora"],
});

/**
 * How many fields differ from the default.
 * @param {Form} now @param {"control"|"advanced"} part
 */
export function changedCount(now, part) {
  const empty = /** @type {any} */ (emptyForm());
  const count = FIELDS[part].filter((name) => /** @type {any} */ (now)[name] !== empty[name]).length;
  const noise = part === "control" && noiseItem(now)?.noise !== null && noiseItem(now) ? 1 : 0;
  return count + noise;
}

/** @param {Form} now @returns {import("../core/store.js").Item|undefined} the picture whose noise has a slider */
export const noiseItem = (now) =>
  now.tab === "image" || (now.tab === "video" && now.mode === "loop") ? now.items[0] : undefined;

/**
 * A number of the form, with the range, step and default that the model gives it.
 * @param {{name: keyof typeof API_NAMES, min?: number}} props
 */
export function NumberSlider({ name, min }) {
  const found = model.value.fields?.[API_NAMES[name]] ?? {};
  const standard = /** @type {any} */ (standards(form.value, model.value))[name];
  const low = min ?? found.low ?? found.minimum ?? 0;
  const high = found.high ?? found.maximum ?? 100;
  return html`<${SliderField}
    id=${name}
    label=${t(`fields.${name}`)}
    help=${t(`fields.help.${name}`)}
    value=${form.value[name]}
    standard=${standard}
    min=${low}
    max=${high}
    limit=${[min ?? found.minimum ?? low, found.maximum ?? high]}
    step=${found.step ?? 1}
    whole=${found.type === "integer"}
    onChange=${(/** @type {number|null} */ value) => edit({ [name]: value }, name)}
  />`;
}
