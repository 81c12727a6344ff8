/** Two results over each other: a line between them is dragged, or moved by keys; both play in step. */
import { html, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { Controls, playerKeys } from "./player.js";
import { fpsOf } from "./result.js";
import { compare, show } from "./selection.js";
import { ratioOf } from "./states.js";
import { Clip, useTransport } from "./transport.js";

/** The place of the line after a key, in percent; null for other keys. @param {string} key @param {number} at @param {boolean} far */
function lineAfter(key, at, far) {
  const by = far ? 10 : 2;
  if (key === "ArrowLeft" || key === "ArrowDown") return Math.max(0, at - by);
  if (key === "ArrowRight" || key === "ArrowUp") return Math.min(100, at + by);
  if (key === "Home") return 0;
  if (key === "End") return 100;
  return null;
}

/** @param {any} job */
const nameOf = (job) => `${job.prompt || t("result.no_prompt")} · ${t("result.seed_is", { seed: String(job.seed ?? "") })}`;

/** @param {{first: any, second: any}} props */
export function Wipe({ first, second }) {
  const transport = useTransport(`${first.id} ${second.id}`);
  const [at, setAt] = useState(50);
  const screen = useRef(/** @type {HTMLElement|null} */ (null));
  const fps = fpsOf(first);

  const drag = (/** @type {PointerEvent} */ event) => {
    if (!(event.buttons & 1) || !screen.current) return;
    const { left, width } = screen.current.getBoundingClientRect();
    setAt(Math.round(Math.max(0, Math.min(100, (100 * (event.clientX - left)) / width))));
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const next = lineAfter(event.key, at, event.shiftKey);
    if (next === null) return;
    event.preventDefault();
    event.stopPropagation();
    setAt(next);
  };
  return html`<div class="player" onKeyDown=${(/** @type {KeyboardEvent} */ event) => playerKeys(event, transport, fps)}>
    <div class="screen"><div class="fit">
      <div
        class="wipe"
        ref=${screen}
        style=${`--ratio:${ratioOf(first)};--line:${at}%`}
        onPointerDown=${(/** @type {PointerEvent} */ event) => {
          /** @type {Element} */ (event.currentTarget).setPointerCapture(event.pointerId);
          drag(event);
        }}
        onPointerMove=${drag}
      >
        <${Clip} transport=${transport} job=${second} label=${nameOf(second)} />
        <div class="wipe-over"><${Clip} transport=${transport} job=${first} label=${nameOf(first)} /></div>
        <span class="wipe-name a" aria-hidden="true">A</span><span class="wipe-name b" aria-hidden="true">B</span>
        <div
          class="wipe-line"
          role="slider"
          tabindex="0"
          aria-label=${t("result.wipe_line")}
          aria-valuemin="0"
          aria-valuemax="100"
          aria-valuenow=${at}
          aria-valuetext=${t("result.wipe_at", { percent: at })}
          onKeyDown=${onKeyDown}
        >
          <span aria-hidden="true"><${Icon} name="left" size=${14} /><${Icon} name="right" size=${14} /></span>
        </div>
      </div>
    </div></div>
    <${Controls} transport=${transport} fps=${fps} full=${() => screen.current} />
    <dl class="wipe-legend small">
      <div><dt>A</dt><dd>${nameOf(first)}</dd></div>
      <div><dt>B</dt><dd>${nameOf(second)}</dd></div>
    </dl>
    <div class="actions">
      <button type="button" class="button" onClick=${() => compare(second.id, first.id)}>
        <${Icon} name="loop" size=${18} />${t("result.wipe_swap")}
      </button>
      <button type="button" class="button" onClick=${() => show([first.id, second.id])}>
        <${Icon} name="grid" size=${18} />${t("result.wipe_beside")}
      </button>
      <button type="button" class="button" onClick=${() => show([first.id])}>${t("result.wipe_end")}</button>
    </div>
  </div>`;
}
