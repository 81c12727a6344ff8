/** Choose one frame of a clip or a result, of which the server draws every one: also of formats the browser cannot play. */
import { html, signal, useEffect, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Dialog } from "../shell/dialog.js";
import { Icon } from "../shell/icon.js";
import { stripOf } from "./filmstrip.js";
import { frameUrl } from "./pictures.js";
import { number } from "./words.js";

/** @typedef {import("../core/store.js").Item} Item */

const opened = signal(/** @type {{clip: Item, index: number, use: (index: number) => void}|null} */ (null));

/**
 * Let the visitor choose a frame.
 * @param {Item} clip  a clip, or a result as one: source, name, frames, fps, seconds and size are read
 * @param {number} index  the frame that is shown first
 * @param {(index: number) => void} use  called with the chosen frame
 */
export function openFrames(clip, index, use) {
  opened.value = { clip, index, use };
}

/** @param {Item} clip */
const countOf = (clip) => Math.max(1, clip.frames ?? Math.round((clip.seconds ?? 0) * (clip.fps ?? 16)));

/** @param {{clip: Item, index: number, use: (index: number) => void}} props */
function Picker({ clip, index: first, use }) {
  const count = countOf(clip);
  const [index, setIndex] = useState(Math.min(count - 1, first));
  const [asked, setAsked] = useState(index); // the frame that the server draws: the next one when this one is there
  const [isLoading, setLoading] = useState(true);
  const close = () => (opened.value = null);
  const go = (/** @type {number} */ to) => setIndex(Math.min(count - 1, Math.max(0, to)));
  const ask = () => {
    setLoading(index !== asked);
    setAsked(index);
  };
  useEffect(() => {
    if (isLoading || index === asked) return;
    ask();
  }, [index]);
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    /** @type {Record<string, number>} */
    const to = { ",": index - 1, ".": index + 1, "<": index - 10, ">": index + 10 };
    if (to[event.key] === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(to[event.key]);
  };
  const choose = () => {
    close();
    use(index);
  };
  const fps = clip.fps ?? count / (clip.seconds || 1);
  const place = t("timeline.frame_at", { frame: index, last: count - 1, seconds: number(index / fps) });
  const actions = html`<button type="button" class="button" onClick=${close}>${t("timeline.cancel")}</button>
    <button type="button" class="button primary" onClick=${choose}>${t("timeline.use_frame")}</button>`;
  return html`<${Dialog} title=${t("timeline.choose_frame")} onClose=${close} actions=${actions} wide class="frames-dialog">
    <div onKeyDown=${onKeyDown}>
      <p class="quiet clip-name">${clip.name}</p>
      <div class="frame-view" style=${`aspect-ratio:${clip.width || 16} / ${clip.height || 9}`}>
        <img src=${frameUrl(clip, { index: asked, width: 960 })} alt=${place} onLoad=${ask} onError=${ask} class=${isLoading ? "is-loading" : ""} />
      </div>
      <div class="frame-scrub" style=${`background-image:url("${stripOf(clip)}")`}>
        <input
          type="range"
          min="0"
          max=${count - 1}
          step="1"
          value=${index}
          aria-label=${t("timeline.frame")}
          aria-valuetext=${place}
          autofocus
          onInput=${(/** @type {any} */ event) => go(Number(event.currentTarget.value))}
        />
      </div>
      <div class="frame-steps">
        <button type="button" class="button" aria-keyshortcuts="," onClick=${() => go(index - 1)}><${Icon} name="left" />${t("timeline.frame_before")} <kbd>,</kbd></button>
        <output class="number">${place}</output>
        <button type="button" class="button" aria-keyshortcuts="." onClick=${() => go(index + 1)}>${t("timeline.frame_after")} <kbd>.</kbd><${Icon} name="right" /></button>
      </div>
    </div>
  <//>`;
}

export function FramesDialog() {
  return opened.value && html`<${Picker} key=${opened.value.clip.id} ...${opened.value} />`;
}
