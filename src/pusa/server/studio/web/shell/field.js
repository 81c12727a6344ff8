/** Labelled fields. An emptied one is null, which stands for the default that it then shows. */
import { html, useId, useState } from "../core/dom.js";
import { decimalMark, t } from "../core/i18n.js";
import { clamp, parseNumber, plainNumber, stepped } from "../core/numbers.js";

/**
 * The frame of a field: label above, help below.
 * @param {{id: string, label: string, help?: string|null, problem?: string|null, hidden?: boolean, class?: string, aside?: any, children?: any}} props
 */
export function Field({ id, label, help, problem, hidden = false, class: name = "", aside, children }) {
  return html`<div class=${`field ${name}`}>
    <div class=${hidden ? "visually-hidden" : "field-head"}><label for=${id}>${label}</label>${aside}</div>
    ${children}
    ${problem && html`<p class="field-problem" id=${`${id}-problem`}>${problem}</p>`}
    ${help && html`<p class="help" id=${`${id}-help`}>${help}</p>`}
  </div>`;
}

/** @param {string} id @param {any} help @param {any} problem */
const described = (id, help, problem) =>
  [problem && `${id}-problem`, help && `${id}-help`].filter(Boolean).join(" ") || undefined;

/**
 * @typedef {object} NumberProps
 * @property {string} label
 * @property {number|null|undefined} value  null: the default
 * @property {(value: number|null) => void} onChange
 * @property {number|null} [standard]  the default, which an emptied field shows
 * @property {number} [min]
 * @property {number} [max]
 * @property {number} [step]
 * @property {boolean} [whole]
 * @property {number} [digits]  decimals that are shown; the value itself has more
 * @property {string} [unit]  behind the number
 * @property {string} [placeholder]  where neither a value nor a default is
 * @property {string|null} [help]
 * @property {boolean} [hidden]
 * @property {boolean} [disabled]
 * @property {string} [class]
 * @property {string} [id]
 * @property {any} [aside]  beside the label
 * @property {any} [inside]  at the end of the box
 */

/**
 * The box of a number alone, without a label. Arrow keys step; what is out of range is set to the nearest end.
 * @param {Omit<NumberProps, "label"> & {id: string, described?: string, boxClass?: string, onProblem?: (text: string|null) => void}} props
 */
export function NumberBox(props) {
  const { id, value, onChange, standard = null, min, max, step = 1, whole = false, placeholder, disabled } = props;
  const [typed, setTyped] = useState(/** @type {string|null} */ (null)); // null: nobody types
  const shown = value ?? standard;
  const exact = shown ?? null;
  const rounded = exact === null || props.digits === undefined ? exact : Number(exact.toFixed(props.digits));
  const text = typed ?? (rounded === null ? "" : plainNumber(rounded).replace(".", decimalMark()));
  const onInput = (/** @type {any} */ event) => {
    const now = event.currentTarget.value;
    setTyped(now);
    if (!now.trim()) {
      props.onProblem?.(null);
      return onChange(null);
    }
    const number = parseNumber(now, whole);
    const inside = number === null ? null : clamp(number, min, max);
    const range = { min: min ?? "", max: max ?? "" };
    if (number === null) props.onProblem?.(t(whole ? "fields.not_whole" : "fields.not_number"));
    else props.onProblem?.(inside === number ? null : t("fields.range", range));
    if (inside !== null) onChange(inside);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const direction = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (!direction) return;
    event.preventDefault();
    setTyped(null);
    onChange(stepped(shown ?? min ?? 0, direction, step, min, max));
  };
  const onBlur = () => {
    setTyped(null);
    props.onProblem?.(null);
  };
  return html`<input
    id=${id}
    class=${`number ${props.boxClass ?? ""}`}
    type="text"
    inputmode=${whole ? "numeric" : "decimal"}
    autocomplete="off"
    role="spinbutton"
    aria-valuenow=${shown ?? undefined}
    aria-valuemin=${min}
    aria-valuemax=${max}
    aria-valuetext=${props.unit && rounded !== null ? `${plainNumber(rounded)} ${props.unit}` : undefined}
    aria-describedby=${props.described}
    placeholder=${placeholder}
    disabled=${disabled}
    value=${text}
    onInput=${onInput}
    onKeyDown=${onKeyDown}
    onBlur=${onBlur}
  />`;
}

/** A number in a box. @param {NumberProps} props */
export function NumberField(props) {
  const own = useId();
  const id = props.id ?? own;
  const [problem, setProblem] = useState(/** @type {string|null} */ (null));
  return html`<${Field} ...${props} id=${id} problem=${problem}>
    <div class="number-box">
      <${NumberBox} ...${props} id=${id} onProblem=${setProblem} described=${described(id, props.help, problem)} />
      ${props.inside}${props.unit && html`<span class="unit" aria-hidden="true">${props.unit}</span>`}
    </div>
  <//>`;
}

/**
 * A number on a slider, and in a box for exact ones. `limit` may be wider than what the slider reaches.
 * @param {NumberProps & {limit?: [number, number]}} props
 */
export function SliderField(props) {
  const own = useId();
  const id = props.id ?? own;
  const [problem, setProblem] = useState(/** @type {string|null} */ (null));
  const { value, standard = null, min = 0, max = 1, step = 0.01, limit = [min, max], onChange, disabled } = props;
  const shown = value ?? standard ?? min;
  const box = { ...props, min: limit[0], max: limit[1] };
  const isStandard = value === null || value === undefined || value === standard;
  const reset =
    !isStandard &&
    standard !== null &&
    html`<button type="button" class="reset" onClick=${() => onChange(null)} title=${t("fields.reset_to", { value: plainNumber(standard) })}>
      ${t("fields.reset")}
    </button>`;
  return html`<${Field} ...${props} id=${id} problem=${problem} aside=${reset}>
    <div class="slider-box">
      <input
        type="range"
        aria-label=${props.label}
        min=${min}
        max=${max}
        step=${step}
        value=${clamp(shown, min, max)}
        disabled=${disabled}
        onInput=${(/** @type {any} */ event) => onChange(Number(event.currentTarget.value))}
      />
      <${NumberBox} ...${box} id=${id} onProblem=${setProblem} described=${described(id, props.help, problem)} />
    </div>
  <//>`;
}

/**
 * @param {object} props
 * @param {string} props.label
 * @param {string|null} props.value  null: the default
 * @param {(value: string|null) => void} props.onChange
 * @param {string|null} [props.standard]  the default; an emptied field then goes back to it when it is left
 * @param {number} [props.rows]  more than 1: several lines
 * @param {number} [props.maxLength]
 * @param {string} [props.placeholder]
 * @param {string|null} [props.help]
 * @param {string|null} [props.problem]
 * @param {boolean} [props.hidden]
 * @param {string} [props.class]
 * @param {string} [props.id]
 * @param {any} [props.aside]
 * @param {boolean} [props.disabled]
 * @param {"text"|"password"|"search"} [props.type]
 */
export function TextField(props) {
  const own = useId();
  const id = props.id ?? own;
  const { value, onChange, standard = null, rows = 1, maxLength, placeholder, help, problem } = props;
  const [empty, setEmpty] = useState(false);
  const shown = empty ? "" : (value ?? standard ?? "");
  const onInput = (/** @type {any} */ event) => {
    const text = event.currentTarget.value;
    setEmpty(text === "" && standard !== null);
    onChange(text === "" && standard !== null ? null : text);
  };
  const shared = {
    id,
    maxLength,
    placeholder,
    value: shown,
    onInput,
    disabled: props.disabled,
    onBlur: () => setEmpty(false),
    "aria-describedby": described(id, help, problem),
    "aria-invalid": problem ? "true" : undefined,
  };
  return html`<${Field} ...${props} id=${id}>
    ${rows > 1 ? html`<textarea rows=${rows} ...${shared}></textarea>` : html`<input type=${props.type ?? "text"} autocomplete="off" ...${shared} />`}
  <//>`;
}

/**
 * @param {object} props
 * @param {string} props.label
 * @param {any} props.value
 * @param {{value: any, label: string, group?: string}[]} props.options
 * @param {(value: any) => void} props.onChange
 * @param {string|null} [props.help]
 * @param {boolean} [props.hidden]
 * @param {string} [props.class]
 * @param {string} [props.id]
 */
export function SelectField(props) {
  const own = useId();
  const id = props.id ?? own;
  const { value, options, onChange, help } = props;
  const groups = [...new Set(options.map((option) => option.group ?? ""))];
  const place = options.findIndex((option) => option.value === value);
  const entry = (/** @type {any} */ option) =>
    html`<option key=${String(option.value)} value=${options.indexOf(option)} selected=${option.value === value}>
      ${option.label}
    </option>`;
  return html`<${Field} ...${props} id=${id}>
    <select
      id=${id}
      value=${place}
      aria-describedby=${described(id, help, null)}
      onChange=${(/** @type {any} */ event) => onChange(options[Number(event.currentTarget.value)].value)}
    >
      ${groups.map((group) => {
        const inside = options.filter((option) => (option.group ?? "") === group).map(entry);
        return group ? html`<optgroup label=${group}>${inside}</optgroup>` : inside;
      })}
    </select>
  <//>`;
}

/**
 * @param {{label: string, value: boolean, onChange: (value: boolean) => void, help?: string|null, disabled?: boolean, id?: string, class?: string}} props
 */
export function CheckField({ label, value, onChange, help, disabled, id, class: name = "" }) {
  const own = useId();
  const field = id ?? own;
  return html`<div class=${`field check ${name}`}>
    <label for=${field}>
      <input
        type="checkbox"
        id=${field}
        checked=${value}
        disabled=${disabled}
        aria-describedby=${described(field, help, null)}
        onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.checked)}
      />
      <span>${label}</span>
    </label>
    ${help && html`<p class="help" id=${`${field}-help`}>${help}</p>`}
  </div>`;
}
