/** The end of the clip: dragged, or moved with the arrow keys, it sets the length in whole latent frames. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model } from "../core/store.js";
import { lengthLimits, setLength } from "./edits.js";
import { onEndDown } from "./pointer.js";
import { apply, drag, layout } from "./state.js";
import { number, seconds as secondsText } from "./words.js";

export function EndHandle() {
  const shown = layout.value;
  if (!shown || !model.value) return null;
  const { count, frames, seconds } = shown.length;
  const { least, most } = lengthLimits(model.value);
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const step = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 4, PageDown: -4 }[event.key];
    const to = event.key === "Home" ? least : step ? count + step : null;
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    apply(setLength(form.value, model.value, to), "length");
  };
  return html`<div
    class=${`end-handle ${drag.value?.what === "length" ? "is-held" : ""}`}
    role="slider"
    tabindex="0"
    aria-label=${t("timeline.length")}
    aria-valuemin=${least}
    aria-valuemax=${most}
    aria-valuenow=${count}
    aria-valuetext=${t("timeline.length_text", { seconds: number(seconds), frames, count })}
    title=${t("timeline.length_help")}
    onKeyDown=${onKeyDown}
    onPointerDown=${onEndDown}
  >
    <span></span>
    ${drag.value?.what === "length" && html`<b class="bubble">${secondsText(seconds)}</b>`}
  </div>`;
}
