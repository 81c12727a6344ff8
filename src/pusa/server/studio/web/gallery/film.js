/** Several clips become one film: their order, a look at them one after another, and the file. */
import { post, url } from "../core/api.js";
import { html, useEffect, useRef, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Dialog } from "../shell/dialog.js";
import { Icon } from "../shell/icon.js";
import { save, tellError } from "../result/actions.js";
import { contentUrl, duration, sizeText } from "../result/words.js";
import { useOrder } from "./order.js";

/** Plays the clips one after another. @param {{clips: any[], at: number, onAt: (at: number) => void}} props */
function Look({ clips, at, onAt }) {
  const ref = useRef(/** @type {HTMLVideoElement|null} */ (null));
  const isFirst = useRef(true);
  const id = clips[at]?.id;
  useEffect(() => {
    if (!isFirst.current) void ref.current?.play().catch(() => {}); // the browser forbids it: its own button plays
    isFirst.current = false;
  }, [id, at]);
  const next = () => onAt(at + 1 < clips.length ? at + 1 : 0);
  return html`<video
    class="film-look"
    ref=${ref}
    src=${contentUrl(clips[at])}
    poster=${contentUrl(clips[at], "thumbnail")}
    controls
    muted
    playsinline
    aria-label=${t("gallery.film.look", { number: at + 1, count: clips.length })}
    onEnded=${next}
  ></video>`;
}

/** @param {{list: any[], onClose: () => void}} props  `list`: the videos in their first order */
export function Film({ list, onClose }) {
  const [ids, setIds] = useState(list.map((job) => job.id));
  const [at, setAt] = useState(0);
  const [isMaking, setMaking] = useState(false);
  const [film, setFilm] = useState(/** @type {any} */ (null));
  const change = (/** @type {string[]} */ next) => {
    setIds(next);
    setFilm(null);
    setAt(0);
  };
  const { order, list: ref, handle } = useOrder(ids, change);
  const clips = order.map((id) => list.find((job) => job.id === id));
  const seconds = clips.reduce((sum, job) => sum + Number(job.seconds), 0);
  const sizes = new Set(clips.map((job) => job.size));
  const make = async () => {
    setMaking(true);
    try {
      setFilm(await post("/v1/films", { videos: ids }));
    } catch (error) {
      tellError(error);
    } finally {
      setMaking(false);
    }
  };
  const content = film && url(`/v1/files/${film.id}/content`);
  return html`<${Dialog}
    wide
    class="film"
    title=${t("gallery.film.title")}
    onClose=${onClose}
    actions=${html`<span class="quiet small number">${t("gallery.film.sum", { count: clips.length, seconds: duration(seconds) })}</span>
      ${film
        ? html`<button type="button" class="button primary" onClick=${() => save(content, film.filename)}><${Icon} name="download" size=${18} />${t("gallery.film.download")}</button>`
        : html`<button type="button" class="button primary" disabled=${isMaking} onClick=${make}><${Icon} name="film" size=${18} />${t(isMaking ? "gallery.film.making" : "gallery.film.make")}</button>`}`}
  >
    ${film
      ? html`<video class="film-look" src=${content} controls autoplay muted playsinline aria-label=${t("gallery.film.done")}></video>`
      : html`<${Look} clips=${clips} at=${Math.min(at, clips.length - 1)} onAt=${setAt} />`}
    <p class="visually-hidden" role="status">${film ? t("gallery.film.done") : ""}</p>
    ${sizes.size > 1 && html`<p class="hint"><${Icon} name="info" size=${18} /><span>${t("gallery.film.scaled", { size: sizeText(clips[0].size) })}</span></p>`}
    <ol class="film-clips" ref=${ref}>
      ${clips.map(
        (job, index) => html`<li key=${job.id} class=${`film-clip ${!film && index === at ? "now" : ""}`} data-order=${job.id}>
          <button type="button" class="film-open" aria-label=${t("gallery.film.play_from", { number: index + 1 })} onClick=${() => (setFilm(null), setAt(index))}>
            <img src=${contentUrl(job, "thumbnail")} alt="" draggable=${false} />
          </button>
          <div class="film-tools">
            ${handle(job.id, t("gallery.film.move", { number: index + 1 }))}
            <button type="button" class="button plain icon" disabled=${ids.length < 3} aria-label=${t("gallery.film.leave_out", { number: index + 1 })} title=${t("gallery.film.leave_out", { number: index + 1 })} onClick=${() => change(ids.filter((id) => id !== job.id))}>
              <${Icon} name="close" size=${16} />
            </button>
          </div>
        </li>`,
      )}
    </ol>
  <//>`;
}
