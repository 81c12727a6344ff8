/** Places and noise as text, in step with the timeline both ways. A text that is not understood changes nothing. */
import { html, useEffect, useId, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { PositionError } from "../core/positions.js";
import { form, misread, model } from "../core/store.js";
import { isAfterEnd, noiseText, positionsText, readNoise, readPositions, spreadEvenly, withLast } from "./edits.js";
import { apply, layout, shownForm } from "./state.js";
import { number } from "./words.js";

/** @param {PositionError} error @returns {string} */
export function problemText({ code, values }) {
  const shown = Object.fromEntries(
    Object.entries(values).map(([name, value]) => [name, typeof value === "number" ? number(value) : value]),
  );
  return t(`timeline.problem.${code}`, shown);
}

/**
 * The text with "last" for what lies after the end; null where that is no answer either.
 * @param {string} text @param {(text: string) => any} read
 */
function repair(text, read) {
  const repaired = withLast(form.value, model.value, text);
  try {
    read(repaired);
    return repaired;
  } catch (error) {
    if (error instanceof PositionError) return null;
    throw error;
  }
}

/**
 * @param {object} props
 * @param {string} props.name  "positions" or "noise"
 * @param {string} props.value  as the timeline has it
 * @param {(text: string) => Partial<import("../core/store.js").Form>} props.read
 */
function TextBox({ name, value, read }) {
  const id = useId();
  const [typed, setTyped] = useState(/** @type {string|null} */ (null)); // null: it shows what the timeline has
  const [error, setError] = useState(/** @type {PositionError|null} */ (null));
  const take = (/** @type {string} */ text) => {
    setTyped(text);
    try {
      apply(read(text), `text-${name}`);
      setError(null);
    } catch (problem) {
      if (!(problem instanceof PositionError)) throw problem;
      setError(problem);
    }
  };
  const leave = () => !error && setTyped(null);
  const input = useRef(/** @type {HTMLInputElement|null} */ (null));
  useEffect(() => {
    if (document.activeElement === input.current) return;
    setTyped(null); // changed on the timeline: a text that stood here with a mistake is of the past
    setError(null);
  }, [value]);
  const repaired = error && isAfterEnd(error) ? repair(typed ?? "", read) : null;
  useEffect(() => {
    if (!error) return;
    const done = () => (setTyped(null), setError(null));
    const fix = repaired === null ? undefined : () => read(repaired);
    misread.value = { ...misread.value, [name]: { key: `timeline.problem.${error.code}`, values: error.values, fix, done } };
    return () => {
      const { [name]: _, ...others } = misread.value;
      misread.value = others;
    };
  }, [error, repaired]);
  return html`<div class=${`field text-box ${name}`}>
    <label for=${id}>${t(`timeline.${name}`)}</label>
    <input
      id=${id}
      ref=${input}
      type="text"
      autocomplete="off"
      spellcheck=${false}
      value=${typed ?? value}
      aria-invalid=${error ? "true" : undefined}
      aria-describedby=${error ? `${id}-problem` : undefined}
      onInput=${(/** @type {any} */ event) => take(event.currentTarget.value)}
      onBlur=${leave}
      onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
        if (event.key !== "Escape") return;
        setTyped(null);
        setError(null);
      }}
    />
    ${
      error &&
      html`<p class="field-problem" id=${`${id}-problem`} role="alert">
      ${problemText(error)}
      ${repaired && html`<button type="button" class="button small" onClick=${() => (take(repaired), setTyped(null))}>${t("timeline.use_last")}</button>`}
    </p>`
    }
  </div>`;
}

/** The two texts, where the open tab has pictures or a clip to place. */
export function Texts() {
  const shown = layout.value;
  if (!shown || !["images", "complete"].includes(shown.kind)) return null;
  const now = shownForm.value;
  if (shown.kind === "images" ? !now.items.length : !now.clips.length) return null;
  const key = `${shown.kind}-${shown.kind === "images" ? now.items.length : ""}`;
  const isSet = shown.pictures.some(({ item, automatic }) => item.position !== null && !automatic);
  return html`
    ${isSet && html`<button type="button" class="button plain spread" onClick=${() => apply(spreadEvenly(form.value), "")}>${t("timeline.spread")}</button>`}
    <${TextBox} key=${`positions-${key}`} name="positions" value=${positionsText(now, model.value)} read=${(/** @type {string} */ text) => readPositions(form.value, model.value, text)} />
    <${TextBox} key=${`noise-${key}`} name="noise" value=${noiseText(now, model.value)} read=${(/** @type {string} */ text) => readNoise(form.value, model.value, text)} />
  `;
}
