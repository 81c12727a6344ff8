/** Frames of a clip side by side, from one picture that the server draws. */
import { html } from "../core/dom.js";
import { frameRange } from "../core/positions.js";
import { frameAt } from "../result/frames.js";
import { usedSeconds } from "./model.js";
import { stripUrl } from "./pictures.js";
import { cell, layout, visibleWidth } from "./state.js";

const MOST = 48; // frames of a strip
const HEIGHT = 160;
const CLIP_HEIGHT = 44; // of a whole clip above the track; timeline.css has the same

/** How many frames a clip's strip has: about four a second. @param {import("../core/store.js").Item} clip */
export const stripCount = (clip) => Math.min(MOST, Math.max(8, Math.ceil((clip.seconds ?? 2) * 4)));

/** The strip of a clip, as the timeline shows it. @param {import("../core/store.js").Item} clip */
export const stripOf = (clip) => stripUrl(clip, stripCount(clip), HEIGHT);

/**
 * One frame of a clip that fills its box.
 * @param {{clip: import("../core/store.js").Item, time: number, width: number, height: number}} props  width and height of the box, pixels
 */
export function Frame({ clip, time, width, height }) {
  const count = stripCount(clip);
  const aspect = clip.width / clip.height || 1;
  const shownHeight = Math.max(height, width / aspect);
  const shownWidth = shownHeight * aspect;
  const left = (width - shownWidth) / 2 - frameAt(time, clip.seconds || 1, count) * shownWidth;
  const style =
    `width:${width}px;height:${height}px;background-image:url("${stripOf(clip)}");` +
    `background-size:${count * shownWidth}px ${shownHeight}px;background-position:${left}px ${(height - shownHeight) / 2}px`;
  return html`<span class="strip-frame" style=${style}></span>`;
}

/**
 * The time of a clip that a latent frame of a part shows.
 * @param {import("../core/store.js").Item} clip @param {import("./model.js").Part} part @param {number} at latent frame
 * @param {import("./model.js").Length} length
 */
function timeInClip(clip, part, at, length) {
  const start = clip.start ?? 0;
  if (part.role === "clip") return start + frameRange(at, length.factor)[0] / length.fps;
  if (part.role === "start") return start + (length.factor * (at - part.from)) / length.fps;
  const taken = frameRange(part.to - 1, length.factor)[1] + 1;
  return start + usedSeconds(clip) - (taken - frameRange(at, length.factor)[0]) / length.fps;
}

/** @param {{clip: import("../core/store.js").Item, part: import("./model.js").Part}} props */
export function Filmstrip({ clip, part }) {
  const length = /** @type {import("./model.js").Layout} */ (layout.value).length;
  const cells = Array.from({ length: part.to - part.from }, (_, number) => part.from + number);
  return html`<span class="filmstrip" aria-hidden="true">
    ${cells.map(
      (at) =>
        html`<${Frame} key=${at} clip=${clip} time=${timeInClip(clip, part, at, length)} width=${cell.value} height=${124} />`,
    )}
  </span>`;
}

/** All of a clip, in as many frames as have room in their own shape. @param {{clip: import("../core/store.js").Item}} props */
export function Frames({ clip }) {
  const width = (CLIP_HEIGHT * clip.width) / clip.height || CLIP_HEIGHT;
  // No strip is wider than the track, or half of it where two stand beside one another: the frames share what there is,
  // and lose a little at their right.
  const beside = layout.value?.kind === "transition" && !matchMedia("(max-width: 860px)").matches ? 2 : 1;
  const count = Math.max(1, Math.ceil(visibleWidth.value / beside / width));
  const times = Array.from({ length: count }, (_, at) => ((at + 0.5) / count) * (clip.seconds || 1));
  return html`<span class="clip-frames" aria-hidden="true">
    ${times.map((time) => html`<${Frame} key=${time} clip=${clip} time=${time} width=${width} height=${CLIP_HEIGHT} />`)}
  </span>`;
}
