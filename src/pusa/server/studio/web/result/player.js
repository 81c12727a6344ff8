/** The bar below a video or several in step: play, the moment, and frame by frame with the keys , and . */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { number } from "./words.js";

/** @param {number} seconds */
const short = (seconds) => number(seconds, { minimumFractionDigits: 2, maximumFractionDigits: 2 });

/** @param {HTMLElement|null} element */
function fullScreen(element) {
  if (document.fullscreenElement) void document.exitFullscreen();
  else void element?.requestFullscreen?.();
}

/**
 * Space plays and pauses, comma and full stop go by one frame, while no field has the focus.
 * @param {KeyboardEvent} event @param {import("./transport.js").Transport} transport @param {number} fps
 */
export function playerKeys(event, transport, fps) {
  const target = /** @type {HTMLElement} */ (event.target);
  const pressed = target.closest("button, a, summary, select, input:not([type=range]), textarea");
  if (event.key === "," || event.key === ".") transport.step(event.key === "." ? 1 : -1, fps);
  else if (event.key === " " && !pressed) transport.toggle();
  else return;
  event.preventDefault();
}

/** @param {{transport: import("./transport.js").Transport, fps: number, full?: () => HTMLElement|null}} props */
export function Controls({ transport, fps, full }) {
  const time = transport.time.value;
  const length = transport.duration.value;
  const playing = transport.playing.value;
  const frame = Math.floor(time * fps + 0.01);
  const name = t(playing ? "result.pause" : "result.play");
  return html`<div class="controls">
    <button type="button" class="button plain icon" aria-label=${name} title=${name} onClick=${() => transport.toggle()}>
      <${Icon} name=${playing ? "pause" : "play"} />
    </button>
    <input
      type="range"
      class="scrubber"
      min="0"
      max=${length || 1}
      step=${1 / fps}
      value=${time}
      style=${`--at:${length ? Math.min(1, time / length) : 0}`}
      aria-label=${t("result.moment")}
      aria-valuetext=${t("result.moment_is", { time: short(time), length: short(length), frame })}
      title=${t("result.moment_help")}
      onInput=${(/** @type {any} */ event) => transport.seek(Number(event.target.value))}
    />
    <span class="small quiet number moment" aria-hidden="true">${short(time)} / ${short(length)} s</span>
    ${full &&
    html`<button type="button" class="button plain icon" aria-label=${t("result.full_screen")} title=${t("result.full_screen")} onClick=${() => fullScreen(full())}>
      <${Icon} name="fit" />
    </button>`}
  </div>
  ${transport.drawn.value && html`<p class="small quiet">${t("result.drawn")}</p>`}`;
}
