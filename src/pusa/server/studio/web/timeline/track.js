/** The strip of latent frames: what is known stands on it as pictures, what is to be made is grain. */
import { html } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { form, model } from "../core/store.js";
import { Card } from "./card.js";
import { EndHandle } from "./end.js";
import { Filmstrip } from "./filmstrip.js";
import { KeptCells } from "./kept.js";
import { onTrackClick } from "./pointer.js";
import { placeCards, indexStep, rulerMarks } from "./scale.js";
import { arriving, cell, drag, dropCell, layout, ordered, size } from "./state.js";
import { number, seconds } from "./words.js";

/** Pixels of the track's height, on wide pages and on narrow ones; timeline.css has the same. */
const trackHeight = () => (matchMedia("(max-width: 860px)").matches ? 96 : 124);

/** Seconds above the track, with the numbers of the frames. */
function Ruler() {
  const marks = rulerMarks(layout.value?.length ?? { frames: 1, fps: 1, factor: 1 }, cell.value);
  return html`<div class="ruler" aria-hidden="true">
    ${marks.map(
      ({ x, seconds: at, frame }) =>
        html`<span class="ruler-mark" key=${at} style=${`left:${x}px`}>${seconds(at)}<small>${frame}</small></span>`,
    )}
  </div>`;
}

/** Numbers of the latent frames below the track; those that are given are marked. */
function Indices() {
  const shown = layout.value;
  if (!shown) return null;
  const width = cell.value;
  const step = indexStep(width);
  const given = new Set([...shown.kept.map((one) => one.cell), ...ordered.value.map((one) => Number(one.cell))]);
  const cells = Array.from({ length: shown.length.count }, (_, at) => at);
  const plain = cells.filter(
    (at) => at % step === 0 && ![...given].some((one) => one !== at && Math.abs(one - at) * width < 24),
  );
  return html`<div class="indices" aria-hidden="true">
    ${plain.filter((at) => !given.has(at)).map((at) => html`<span key=${at} style=${`left:${(at + 0.5) * width}px`}>${at}</span>`)}
    ${[...given].map((at) => html`<b key=${at} style=${`left:${(at + 0.5) * width}px`}>${at}</b>`)}
  </div>`;
}

/** @param {{part: import("./model.js").Part}} props */
function PartArea({ part }) {
  const width = (part.to - part.from) * cell.value;
  const clip = part.clip === null ? null : form.value.clips[part.clip];
  const isShown = part.role !== "clip";
  return html`<div class=${`part ${part.role}`} style=${`left:${part.from * cell.value}px;width:${width}px`}>
    ${clip && html`<${Filmstrip} clip=${clip} part=${part} />`}
    ${isShown && width > 96 && html`<span class="part-name">${t(`timeline.part.${part.role}`)}</span>`}
  </div>`;
}

/** What is held over the track or on its way to it. */
function Arriving() {
  const width = cell.value;
  const place = (/** @type {number} */ at) => `left:${at * width}px;width:${width}px`;
  return html`${arriving.value
    .filter((one) => one.cell !== null)
    .map(
      (one) => html`<div class="arriving" key=${one.id} style=${place(Number(one.cell))} title=${one.name}>
          ${one.preview && html`<img src=${one.preview} alt="" />`}<span class="visually-hidden">${t("timeline.uploading", { name: one.name })}</span>
        </div>`,
    )}
    ${dropCell.value !== null && html`<div class="drop-cell" style=${place(dropCell.value)}></div>`}`;
}

/** What somebody reads on a track on which nothing lies yet. */
function Hint() {
  const shown = layout.value;
  if (!shown || shown.pictures.length || arriving.value.length || ["loop"].includes(shown.kind)) return null;
  const clips = { complete: 1, extend: 1, transition: 2 };
  const needed = /** @type {Record<string, number>} */ (clips)[shown.kind] ?? 0;
  if (needed && form.value.clips.length >= needed) return null;
  return html`<p class="track-hint"><span>${t(`timeline.empty.${shown.kind}`)}</span></p>`;
}

/** The pictures, each a slider of its noise. */
function Cards() {
  const shown = layout.value;
  if (!shown?.pictures.length) return null;
  const height = trackHeight() - 12;
  const ideal = Math.min((height * size.value.width) / size.value.height, 260);
  const cells = ordered.value.map((one) => Number(one.cell));
  const places = placeCards(cells, cell.value, ideal, shown.length.count * cell.value);
  return html`<div class="cards" role="group" aria-label=${t("timeline.pictures")}>
    ${ordered.value.map((one, index) => html`<${Card} key=${one.item.id} one=${one} place=${places[index]} />`)}
  </div>`;
}

/** The track with its ruler and numbers, as wide as the clip is long. */
export function Track() {
  const shown = layout.value;
  if (!shown || !model.value)
    return html`<div class="track-frame is-waiting"><div class="ruler"></div><div class="track"></div><div class="indices"></div></div>`;
  const width = cell.value * shown.length.count;
  return html`<div class=${`track-frame ${drag.value ? `is-dragging-${drag.value.what}` : ""}`} style=${`width:${width}px;--cell:${cell.value}px`}>
    <${Ruler} />
    <div class=${`track kind-${shown.kind}`} data-track onClick=${onTrackClick}>
      ${shown.parts.map((part) => html`<${PartArea} key=${part.role} part=${part} />`)}
      <div class="track-lines" aria-hidden="true"></div>
      ${shown.kind === "complete" && html`<${KeptCells} />`}
      <${Hint} />
      <${Cards} />
      <${Arriving} />
    </div>
    <${Indices} />
    <${EndHandle} />
  </div>`;
}

/** What the clip is, in one line. @returns {string} */
export function summary() {
  const shown = layout.value;
  if (!shown) return "";
  const { frames, count, fps } = shown.length;
  const values = {
    frames,
    count,
    fps: number(fps),
    seconds: number(shown.length.seconds),
    total: seconds(shown.total),
  };
  return t(shown.before || shown.after ? "timeline.summary_total" : "timeline.summary", values);
}
