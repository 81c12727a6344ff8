/** Latent frames of a clip to complete: each is kept, with noise, or made anew. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model } from "../core/store.js";
import { toggleKept } from "./edits.js";
import { onKeptKey } from "./keys.js";
import { timeOf } from "./model.js";
import { onKeptDown } from "./pointer.js";
import { apply, cell, chosen, drag, layout } from "./state.js";
import { number } from "./words.js";

/** Keep or release one, and stay there. @param {number} at */
export function toggle(at) {
  chosen.value = `cell:${at}`;
  apply(toggleKept(form.value, model.value, at), "");
}

export function KeptCells() {
  const shown = layout.value;
  if (!shown || !form.value.clips.length) return null;
  const kept = new Map(shown.kept.map((one) => [one.cell, one]));
  const available = shown.parts.find((part) => part.role === "clip")?.to ?? 0;
  const current = chosen.value.startsWith("cell:") ? Number(chosen.value.slice(5)) : 0;
  const stop = Math.min(current, shown.length.count - 1);
  const cells = Array.from({ length: shown.length.count }, (_, at) => at);
  return html`<div class="kept-cells" role="listbox" aria-multiselectable="true" aria-orientation="horizontal" aria-label=${t("timeline.kept_frames")}>
    ${cells.map((at) => {
      const one = kept.get(at);
      const values = { cell: at, seconds: number(timeOf(at, shown.length)), noise: one ? number(one.noise) : "" };
      const state = one ? "kept" : at < available ? "free" : "beyond";
      const held = drag.value?.id === `cell:${at}` ? "is-held" : "";
      return html`<div
        key=${at}
        class=${`kept-cell is-${state} ${held} ${chosen.value === `cell:${at}` ? "is-chosen" : ""}`}
        style=${`--noise:${one?.noise ?? 1};--at:${at}`}
        role="option"
        aria-selected=${one ? "true" : "false"}
        aria-label=${t(`timeline.cell_${state}`, values)}
        title=${t(`timeline.cell_${state}`, values)}
        tabindex=${at === stop ? 0 : -1}
        data-cell=${at}
        onFocus=${() => (chosen.value = `cell:${at}`)}
        onKeyDown=${(/** @type {KeyboardEvent} */ event) => onKeptKey(event, at)}
        onPointerDown=${(/** @type {PointerEvent} */ event) => onKeptDown(event, at, one)}
      >
        <span class="grain"></span>
        ${one && html`<span class="noise-handle" data-handle="noise"><span></span></span>`}
        ${one && cell.value >= 30 && html`<span class="card-noise">${number(one.noise)}</span>`}
      </div>`;
    })}
  </div>`;
}
