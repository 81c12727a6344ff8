/** The clips that a video goes on from: which part of each is used, and what of it the timeline takes over. */
import { html, useEffect, useId, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model, newId } from "../core/store.js";
import { NumberBox } from "../shell/field.js";
import { Icon } from "../shell/icon.js";
import { openCrop } from "./crop.js";
import { chooseFiles } from "./drop.js";
import { addPicture, changeItem, removeItem } from "./edits.js";
import { stripCount, stripOf } from "./filmstrip.js";
import { openFrames } from "./frames.js";
import { usedSeconds } from "./model.js";
import { contentUrl, frameUrl, regionOf } from "./pictures.js";
import { apply, layout, size } from "./state.js";
import { seconds, number } from "./words.js";

/** @typedef {import("../core/store.js").Item} Item */

/** @param {Item} clip @returns {[number, number]} seconds */
const rangeOf = (clip) => [clip.start ?? 0, clip.end ?? clip.seconds ?? 0];

/** Seconds of the clip that the timeline shows. @param {Item} clip @param {number} index @returns {[number, number]} */
function takenOf(clip, index) {
  const shown = /** @type {import("./model.js").Layout} */ (layout.value);
  const [start, end] = rangeOf(clip);
  if (shown.kind === "complete") return [start, Math.min(end, start + shown.length.seconds)];
  const taken = shown.overlap / shown.length.fps;
  return index === 0 ? [Math.max(start, end - taken), end] : [start, Math.min(end, start + taken)];
}

/** Set one end of a clip, on a whole frame, at least one frame from the other. @param {Item} clip @param {"start"|"end"} edge @param {number} to seconds */
function setEdge(clip, edge, to) {
  const fps = clip.fps || 16;
  const [start, end] = rangeOf(clip);
  const whole = clip.seconds ?? 0;
  const near = Math.round(to * fps) / fps;
  const value =
    edge === "start" ? Math.min(Math.max(0, near), end - 1 / fps) : Math.max(Math.min(whole, near), start + 1 / fps);
  const isOpen = edge === "start" ? value <= 0.0005 : value >= whole - 0.0005;
  apply(
    changeItem(form.value, clip.id, { [edge]: isOpen ? null : Math.round(value * 1000) / 1000 }),
    `trim-${edge}:${clip.id}`,
  );
}

/** @param {{clip: Item, edge: "start"|"end"}} props */
function Edge({ clip, edge }) {
  const whole = clip.seconds || 1;
  const at = rangeOf(clip)[edge === "start" ? 0 : 1];
  const step = 1 / (clip.fps || 16);
  const onPointerDown = (/** @type {PointerEvent} */ event) => {
    if (event.button) return;
    const handle = /** @type {HTMLElement} */ (event.currentTarget);
    const box = /** @type {HTMLElement} */ (handle.parentElement).getBoundingClientRect();
    handle.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    handle.onpointermove = (now) => {
      const found = form.value.clips.find((one) => one.id === clip.id);
      if (found) setEdge(found, edge, ((now.clientX - box.left) / box.width) * whole);
    };
    handle.onpointerup = handle.onpointercancel = () => (handle.onpointermove = null);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const by = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -1, PageUp: 1 }[
      event.key
    ];
    const to = event.key === "Home" ? 0 : event.key === "End" ? whole : by ? at + by : null;
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    setEdge(clip, edge, to);
  };
  return html`<span
    class=${`clip-edge ${edge}`}
    style=${`left:${(100 * at) / whole}%`}
    role="slider"
    tabindex="0"
    aria-label=${t(`timeline.clip_${edge}`)}
    aria-valuemin="0"
    aria-valuemax=${whole}
    aria-valuenow=${at}
    aria-valuetext=${seconds(at)}
    onPointerDown=${onPointerDown}
    onKeyDown=${onKeyDown}
  ></span>`;
}

/** @param {{clip: Item, edge: "start"|"end"}} props */
function EdgeNumber({ clip, edge }) {
  const at = rangeOf(clip)[edge === "start" ? 0 : 1];
  const whole = clip.seconds ?? 0;
  const set = (/** @type {number|null} */ value) => setEdge(clip, edge, value ?? (edge === "start" ? 0 : whole));
  const id = useId();
  return html`<span class="edge-number"><label for=${id}>${t(`timeline.${edge}`)}</label>
    <${NumberBox} id=${id} boxClass="input" value=${at} min=${0} max=${whole} step=${0.1} digits=${2} onChange=${set} /><span aria-hidden="true">s</span></span>`;
}

/** The clip in little, playing its part: by the browser, or where it cannot, by the frames that the server draws. */
function Monitor(/** @type {{clip: Item, onTime: (time: number|null) => void}} */ { clip, onTime }) {
  const [isPlaying, setPlaying] = useState(false);
  const [isDrawn, setDrawn] = useState(false);
  const video = useRef(/** @type {HTMLVideoElement|null} */ (null));
  const [start, end] = rangeOf(clip);
  const [at, setAt] = useState(start);
  const stop = () => {
    setPlaying(false);
    onTime(null);
  };
  useEffect(() => {
    if (!isPlaying) return undefined;
    let frame = 0;
    const begun = performance.now();
    if (video.current) video.current.currentTime = start;
    const tick = () => {
      const time = isDrawn || !video.current ? start + (performance.now() - begun) / 1000 : video.current.currentTime;
      setAt(time);
      onTime(Math.min(time, end));
      if (time >= end - 0.01 || video.current?.ended) stop();
      else frame = requestAnimationFrame(tick);
    };
    frame = requestAnimationFrame(tick);
    return () => cancelAnimationFrame(frame);
  }, [isPlaying, isDrawn]);
  const count = stripCount(clip);
  const index = Math.min(count - 1, Math.floor((at / (clip.seconds || 1)) * count));
  const drawn = html`<span class="monitor-drawn" style=${`background-image:url("${stripOf(clip)}");background-size:${count * 100}% 100%;background-position:${count > 1 ? (100 * index) / (count - 1) : 0}% 0`}></span>`;
  const still = html`<img src=${frameUrl(clip, { time: start, width: 320 })} alt="" />`;
  const playing = html`<video ref=${video} src=${contentUrl(clip)} muted playsinline autoplay onError=${() => setDrawn(true)}></video>`;
  return html`<div class="monitor" style=${`aspect-ratio:${clip.width || 16} / ${clip.height || 9}`}>
    ${!isPlaying ? still : isDrawn ? drawn : playing}
    <button type="button" class="button icon" aria-label=${t(isPlaying ? "timeline.stop" : "timeline.play")} onClick=${() => (isPlaying ? stop() : setPlaying(true))}>
      <${Icon} name=${isPlaying ? "stop" : "play"} />
    </button>
  </div>`;
}

/** @param {{clip: Item, index: number}} props */
function ClipRow({ clip, index }) {
  const [time, setTime] = useState(/** @type {number|null} */ (null));
  const whole = clip.seconds || 1;
  const [start, end] = rangeOf(clip);
  const [from, to] = takenOf(clip, index);
  const { cut } = regionOf(clip, size.value.width / size.value.height, form.value.fit);
  const percent = (/** @type {number} */ value) => `${((100 * value) / whole).toFixed(3)}%`;
  const useFrame = () =>
    openFrames(clip, Math.round(start * (clip.fps ?? 16)), (frame) => {
      const still = { ...clip, id: newId(), frame, start: null, end: null, position: null, noise: null };
      apply(addPicture({ ...form.value, tab: "images" }, model.value, still, null), "");
    });
  return html`<div class="clip">
    <${Monitor} key=${`${clip.id}-${start}-${end}`} clip=${clip} onTime=${setTime} />
    <div class="clip-body">
      <div class="clip-head">
        <b class="clip-name" title=${clip.name}>${t("timeline.clip", { number: index + 1 })} <span class="quiet">${clip.name}</span></b>
        <span class="quiet number">${t("timeline.clip_used", { used: number(usedSeconds(clip)), seconds: number(whole) })}</span>
      </div>
      <div class="clip-strip" style=${`background-image:url("${stripOf(clip)}")`}>
        <span class="clip-cut" style=${`left:0;width:${percent(start)}`}></span>
        <span class="clip-cut" style=${`left:${percent(end)};right:0`}></span>
        <span class="clip-taken" style=${`left:${percent(from)};width:${percent(to - from)}`} title=${t("timeline.clip_taken")}></span>
        ${time !== null && html`<span class="clip-playhead" style=${`left:${percent(time)}`}></span>`}
        <${Edge} clip=${clip} edge="start" />
        <${Edge} clip=${clip} edge="end" />
      </div>
      <div class="clip-tools">
        <${EdgeNumber} clip=${clip} edge="start" />
        <${EdgeNumber} clip=${clip} edge="end" />
        <button type="button" class="button" onClick=${useFrame}><${Icon} name="image" /><span class="word">${t("timeline.frame_of_clip")}</span></button>
        ${cut > 0.02 && html`<span class="cut-note">${t(clip.crop ? "timeline.cut_more" : "timeline.cut", { percent: number(100 * cut, 0) })}</span>`}
        <button type="button" class="button" onClick=${() => openCrop(clip)}><${Icon} name="crop" /><span class="word">${t(clip.crop ? "timeline.cropped" : "timeline.crop")}</span></button>
        <button type="button" class="button icon" aria-label=${t("timeline.remove_clip", { number: index + 1 })} title=${t("timeline.remove_clip", { number: index + 1 })} onClick=${() => apply(removeItem(form.value, clip.id), "")}><${Icon} name="trash" /></button>
      </div>
    </div>
  </div>`;
}

/** The clips of the tab "video"; where one is missing, the place to put it. */
export function Clips() {
  const shown = layout.value;
  if (!shown || !["complete", "extend", "transition"].includes(shown.kind)) return null;
  const slots = shown.kind === "transition" ? [0, 1] : [0];
  return html`<div class=${`clips ${slots.length > 1 ? "are-two" : ""}`}>
    ${slots.map((index) => {
      const clip = form.value.clips[index];
      if (clip) return html`<${ClipRow} key=${clip.id} clip=${clip} index=${index} />`;
      return html`<button key=${`empty-${index}`} type="button" class="clip-empty" onClick=${() => chooseFiles(null)}><${Icon} name="video" /><span>${t(slots.length > 1 ? `timeline.add_clip_${index}` : "timeline.add_clip")}</span></button>`;
    })}
  </div>`;
}
