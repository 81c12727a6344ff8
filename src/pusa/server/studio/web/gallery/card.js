/** A video in the gallery: its picture, which plays under the pointer and with the focus, and what is done most. */
import { editVideo } from "../core/editing.js";
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { selected } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { Menu } from "../shell/menu.js";
import { again, removeAll, setFavourite, vary } from "../result/actions.js";
import { downloads, intoForm } from "../result/result.js";
import { compare, comparison, isPicking, show } from "../result/selection.js";
import { ratioOf, stateOf } from "../result/states.js";
import { movesLess } from "../result/transport.js";
import { ago, contentUrl, duration, sizeText } from "../result/words.js";
import { anchor, choose, chosen, choosing, videos } from "./state.js";
import { between } from "./model.js";

const DRAGGED = "application/x-pusa-video";

/** @param {string} id  select all from the last one that was selected on */
export function chooseTo(id) {
  const order = videos.value.map((job) => job.id);
  const from = anchor.value || id;
  chosen.value = new Set([...chosen.value, ...between(order, from, id)]);
}

/** @param {any} job */
export function open(job) {
  if (isPicking() && comparison.value && comparison.value.first !== job.id) compare(comparison.value.first, job.id);
  else show([job.id]);
}

/** @param {any} job @param {MouseEvent} event */
function press(job, event) {
  if (event.shiftKey && (chosen.value.size || anchor.value)) chooseTo(job.id);
  else if (choosing.value || event.ctrlKey || event.metaKey) choose(job.id, !chosen.value.has(job.id));
  else open(job);
}

/** @param {any} job */
const more = (job) => [
  { label: t("result.edit"), icon: "edit", act: () => void intoForm(() => editVideo(job.id)) },
  { label: t("result.vary"), icon: "dice", act: () => void vary(job) },
  { label: t("result.again"), icon: "replace", act: () => void again(job) },
  ...downloads(job),
  { label: t("result.delete"), icon: "trash", danger: true, act: () => void removeAll([job]) },
];

/** @param {DragEvent} event @param {any} job */
function drag(event, job) {
  if (!event.dataTransfer) return;
  event.dataTransfer.effectAllowed = "copy";
  event.dataTransfer.setData(DRAGGED, job.id);
  event.dataTransfer.setData("text/plain", job.prompt || job.id);
}

/** @param {{job: any, isStop: boolean, onFocus: () => void}} props  `isStop`: the Tab key stops at this card */
export function Card({ job, isStop, onFocus }) {
  const [plays, setPlays] = useState(false);
  const prompt = job.prompt || t("result.no_prompt");
  const isChosen = chosen.value.has(job.id);
  const expired = stateOf(job) === "expired";
  const stop = isStop ? 0 : -1;
  const favourite = t(job.favourite ? "result.unfavourite" : "result.favourite");
  const ratio = Math.max(0.5625, Math.min(2.4, ratioOf(job)));
  const start = () => setPlays(!expired && !movesLess());
  return html`<li
    class=${`tile ${isChosen ? "chosen" : ""} ${ratio < 0.8 ? "narrow" : ""}`}
    style=${`--ratio:${ratio}`}
    data-id=${job.id}
    draggable=${!expired}
    onDragStart=${(/** @type {DragEvent} */ event) => drag(event, job)}
    onPointerEnter=${(/** @type {PointerEvent} */ event) => event.pointerType === "mouse" && start()}
    onPointerLeave=${() => setPlays(false)}
    onFocusIn=${() => {
      onFocus();
      start();
    }}
    onFocusOut=${() => setPlays(false)}
  >
    <button
      type="button"
      class="tile-open"
      tabindex=${stop}
      aria-label=${t(choosing.value ? "gallery.select_one" : "gallery.open", { prompt })}
      aria-current=${selected.value.includes(job.id) ? "true" : undefined}
      aria-pressed=${choosing.value ? String(isChosen) : undefined}
      title=${prompt}
      onClick=${(/** @type {MouseEvent} */ event) => press(job, event)}
    >
      ${expired
        ? html`<span class="tile-gone small">${t("gallery.expired")}</span>`
        : html`<img src=${contentUrl(job, "thumbnail")} alt="" loading="lazy" decoding="async" draggable=${false} />`}
      ${plays && html`<video src=${contentUrl(job)} autoplay muted loop playsinline aria-hidden="true" tabindex="-1"></video>`}
    </button>
    <label class="tile-check">
      <input
        type="checkbox"
        tabindex=${stop}
        checked=${isChosen}
        aria-label=${t("gallery.select_one", { prompt })}
        onClick=${(/** @type {MouseEvent} */ event) => {
          if (event.shiftKey) chooseTo(job.id);
          else choose(job.id, /** @type {HTMLInputElement} */ (event.target).checked);
        }}
      />
    </label>
    <div class=${`tile-tools ${job.favourite ? "kept" : ""}`} data-stop=${isStop ? "" : undefined}>
      <button type="button" class="button plain icon tile-edit" tabindex=${stop} aria-label=${t("result.edit")} title=${t("result.edit")} onClick=${() => intoForm(() => editVideo(job.id))}>
        <${Icon} name="edit" size=${18} />
      </button>
      <${Menu} label=${t("gallery.more")} entries=${more(job)} stop=${stop} />
      <button type="button" class="button plain icon tile-star" tabindex=${stop} aria-label=${favourite} title=${favourite} aria-pressed=${String(Boolean(job.favourite))} onClick=${() => setFavourite([job], !job.favourite)}>
        <${Icon} name="star" size=${18} filled=${job.favourite} />
      </button>
    </div>
    <p class="tile-prompt small">${prompt}</p>
    <p class="tile-facts quiet number">${sizeText(job.size)} · ${duration(Number(job.seconds))} · ${ago(job.created_at)}</p>
  </li>`;
}
