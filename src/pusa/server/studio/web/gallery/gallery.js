/** All videos of the visitor, the newest first: search, filters, selecting many, paging by scrolling. */
import { editVideo } from "../core/editing.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { removeAll, setFavourite } from "../result/actions.js";
import { intoForm } from "../result/result.js";
import { isPicking } from "../result/selection.js";
import { Card, chooseTo } from "./card.js";
import { Chosen } from "./chosen.js";
import { isFiltered, neighbour, noFilter } from "./model.js";
import { anchor, choose, choosing, chosen, chosenVideos, cursor, filter, hasFailed, hasMore, isReading, readMore, setFilter, startGallery, videos } from "./state.js";
import { Unfinished } from "./unfinished.js";

const TASKS = ["generate", "extend", "transition", "loop"];
const TYPING_MS = 250; // without a key before it is searched

function Search() {
  const [text, setText] = useState(filter.value.q);
  useEffect(() => setText(filter.value.q), [filter.value.q]);
  useEffect(() => {
    if (text === filter.peek().q) return;
    const timer = setTimeout(() => setFilter({ q: text }), TYPING_MS);
    return () => clearTimeout(timer);
  }, [text]);
  return html`<label class="gallery-search" data-own-undo>
    <span class="visually-hidden">${t("gallery.search")}</span>
    <${Icon} name="search" size=${18} />
    <input
      type="search"
      class="input"
      value=${text}
      placeholder=${t("gallery.search")}
      onInput=${(/** @type {any} */ event) => setText(event.target.value)}
    />
  </label>`;
}

function Head() {
  const { task, favourite } = filter.value;
  return html`<div class="gallery-head">
    <h2 id="gallery-title">${t("gallery.title")}</h2>
    <${Search} />
    <label class="gallery-task">
      <span class="visually-hidden">${t("gallery.task")}</span>
      <select class="input" value=${task} onChange=${(/** @type {any} */ event) => setFilter({ task: event.target.value })}>
        <option value="">${t("gallery.all_tasks")}</option>
        ${TASKS.map((name) => html`<option key=${name} value=${name}>${t(`result.tasks.${name}`)}</option>`)}
      </select>
    </label>
    <button type="button" class="button toggle" aria-pressed=${String(favourite)} onClick=${() => setFilter({ favourite: !favourite })}>
      <${Icon} name="star" size=${18} filled=${favourite} /><span>${t("gallery.favourites")}</span>
    </button>
    <button
      type="button"
      class="button toggle"
      aria-pressed=${String(choosing.value)}
      onClick=${() => {
        choosing.value = !choosing.value;
        if (!choosing.value) chosen.value = new Set();
      }}
    >
      <${Icon} name="check" size=${18} /><span>${t("gallery.select")}</span>
    </button>
  </div>`;
}

/** Reads the next page when it comes near. */
function Further() {
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  const at = cursor.value;
  const more = hasMore.value;
  const failed = hasFailed.value;
  useEffect(() => {
    if (!more || failed || !ref.current) return;
    const observer = new IntersectionObserver(
      ([entry]) => {
        if (entry.isIntersecting && !isReading.peek()) void readMore();
      },
      { rootMargin: "800px" },
    );
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, [at, more, failed, filter.value, isReading.value]);
  return html`<div class="gallery-further" ref=${ref}>
    ${more && failed && html`<button type="button" class="button" onClick=${() => readMore()}>${t("gallery.show_more")}</button>`}
    ${more && !failed && videos.value.length > 0 && html`<span class="quiet small">${t("gallery.reading")}</span>`}
  </div>`;
}

function None() {
  if (isReading.value || (hasMore.value && !hasFailed.value)) return null;
  if (!isFiltered(filter.value)) return html`<p class="quiet gallery-none">${t("gallery.empty")}</p>`;
  return html`<p class="quiet gallery-none">
    ${t("gallery.none_match")}
    <button type="button" class="button" onClick=${() => setFilter(noFilter())}>${t("gallery.clear_filter")}</button>
  </p>`;
}

/** @param {KeyboardEvent} event @param {any} job */
function act(event, job) {
  const key = event.key.toLowerCase();
  if (key === "x") choose(job.id, !chosen.value.has(job.id));
  else if (key === "f") void setFavourite([job], !job.favourite);
  else if (key === "e") void intoForm(() => editVideo(job.id));
  else if (key === "delete" || key === "backspace") void removeAll(chosen.value.has(job.id) ? chosenVideos.value : [job]);
  else return false;
  return true;
}

function Grid() {
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  const [at, setAt] = useState({ id: "", index: 0 });
  const hadFocus = useRef(false);
  const list = videos.value;
  const index = list.findIndex((job) => job.id === at.id);
  const stop = index >= 0 ? index : Math.min(at.index, list.length - 1);
  const tiles = () => /** @type {HTMLElement[]} */ ([...(ref.current?.querySelectorAll(".tile") ?? [])]);

  useLayoutEffect(() => {
    // The card with the focus was deleted: the focus goes to the one that took its place.
    if (!hadFocus.current || document.activeElement !== document.body || !list.length) return;
    /** @type {HTMLElement|null} */ (tiles()[stop]?.querySelector(".tile-open"))?.focus();
  }, [list]);

  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const tile = /** @type {HTMLElement|null} */ (target.closest(".tile"));
    if (!tile || target.closest("[role=menu]")) return;
    const all = tiles();
    const from = all.indexOf(tile);
    const isMarked = event.ctrlKey || event.metaKey;
    if (isMarked && event.key.toLowerCase() === "a") chosen.value = new Set(list.map((job) => job.id));
    else if (event.key === "Escape" && chosen.value.size) chosen.value = new Set();
    else if (isMarked || event.altKey) return;
    else {
      const next = neighbour(all.map((one) => one.getBoundingClientRect()), from, event.key);
      if (next === from) {
        if (!act(event, list[from])) return;
      } else {
        if (event.shiftKey) {
          if (!chosen.value.size) anchor.value = list[from].id;
          chooseTo(list[next].id);
        }
        /** @type {HTMLElement|null} */ (all[next].querySelector(".tile-open"))?.focus();
      }
    }
    event.preventDefault();
  };
  return html`<ul
    class=${`tiles ${choosing.value || chosen.value.size ? "choosing" : ""} ${isPicking() ? "picking" : ""}`}
    ref=${ref}
    onKeyDown=${onKeyDown}
    onFocusIn=${() => (hadFocus.current = true)}
    onFocusOut=${(/** @type {FocusEvent} */ event) => {
      if (event.relatedTarget && !ref.current?.contains(/** @type {Node} */ (event.relatedTarget))) hadFocus.current = false;
    }}
  >
    ${list.map(
      (job, place) =>
        html`<${Card} key=${job.id} job=${job} isStop=${place === stop} onFocus=${() => setAt({ id: job.id, index: place })} />`,
    )}
  </ul>`;
}

export function Gallery() {
  useEffect(startGallery, []);
  const count = videos.value.length;
  return html`<section class="gallery" aria-labelledby="gallery-title">
    <${Head} />
    ${isPicking() && html`<p class="hint" role="status"><${Icon} name="compare" size=${18} /><span>${t("result.pick")}</span></p>`}
    ${count > 0 ? html`<${Grid} />` : html`<${None} />`}
    <${Further} />
    <${Unfinished} />
    <${Chosen} />
    ${count > 0 && html`<p class="visually-hidden">${t("gallery.keys")}</p>`}
  </section>`;
}
