/** What a video was made of: the main facts in a line, notes of its making, and all settings below a heading. */
import { html, useEffect, useId, useState } from "../core/dom.js";
import { has, t, told } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { requestOf, tellError } from "./actions.js";
import { rows } from "./rows.js";
import { stateOf } from "./states.js";
import { ago, duration, number, sizeText } from "./words.js";

/** @param {string} word  of the API @param {string} group  section of its texts */
const named = (word, group) => (has(`${group}.${word}`) ? t(`${group}.${word}`) : word);

/** @param {string} key @param {any} value */
function shown(key, value) {
  if (key === "task") return named(value, "result.tasks");
  if (key === "preset") return named(value, "form.presets");
  if (key === "fit") return named(value, "result.fits");
  if (key === "size") return sizeText(value);
  if (key === "seed") return String(value);
  if (key === "ways") return value.map((/** @type {string} */ one) => named(one, "result.ways")).join(", ");
  if (key === "seconds") {
    const length = duration(value.seconds);
    if (!value.frames) return length;
    return `${length} · ${t(value.fps ? "result.frames_at" : "result.frames", { frames: value.frames, fps: number(value.fps ?? 0) })}`;
  }
  if (key === "given") {
    return value.map((/** @type {{place: string, noise: number|null}} */ { place, noise }, /** @type {number} */ index) => {
      const where = place ? t("result.at_place", { place }) : t("result.at_auto");
      return html`<span class="given" key=${index}>${index + 1}. ${where}${noise === null ? "" : ` · ${t("result.noise_is", { noise: number(noise) })}`}</span>`;
    });
  }
  return typeof value === "number" ? number(value) : String(value);
}

/** @param {{job: any}} props */
function Settings({ job }) {
  const [request, setRequest] = useState(/** @type {any} */ (null));
  useEffect(() => {
    let isOpen = true;
    requestOf(job).then(
      (found) => isOpen && setRequest(found),
      (error) => isOpen && tellError(error),
    );
    return () => {
      isOpen = false;
    };
  }, [job.id]);
  if (!request) return html`<p class="quiet small settings-wait" aria-busy="true">${t("result.reading")}</p>`;
  return html`<dl class="settings">
    ${rows(request, job).map(
      ([key, value]) => html`<div key=${key} class=${key === "prompt" || key === "prompts" || key === "negative_prompt" ? "wide" : ""}><dt>${t(`result.rows.${key}`)}</dt><dd>${shown(key, value)}</dd></div>`,
    )}
  </dl>`;
}

/** @param {any} job @returns {string[]} */
function facts(job) {
  const found = [sizeText(job.size), duration(Number(job.seconds))];
  if (job.seed !== null && job.seed !== undefined) found.push(t("result.seed_is", { seed: String(job.seed) }));
  if (stateOf(job) === "completed" && job.inference_time_s) found.push(t("result.took", { time: duration(job.inference_time_s) }));
  found.push(ago(job.completed_at ?? job.created_at));
  return found;
}

/** @param {{job: any, beside?: any}} props  `beside` stands at the end of the facts */
export function About({ job, beside }) {
  const [isOpen, setOpen] = useState(false);
  const id = useId();
  const notes = job.note_details?.length ? job.note_details : (job.notes ?? []).map((/** @type {string} */ message) => ({ message }));
  return html`<div class="about">
    ${job.prompt && html`<p class="about-prompt">${job.prompt}</p>`}
    <div class="about-facts">
      <p class="facts small quiet number">
        ${job.draft && html`<span class="tag">${t("result.ways.draft")}</span>`}
        ${facts(job).map((fact) => html`<span key=${fact}>${fact}</span>`)}
      </p>
      <button type="button" class="button plain more" aria-expanded=${String(isOpen)} aria-controls=${id} onClick=${() => setOpen(!isOpen)}>
        ${t("result.settings")}<${Icon} name=${isOpen ? "up" : "down"} size=${16} />
      </button>
      ${beside}
    </div>
    ${notes.length > 0 &&
    html`<ul class="notes small">
      ${notes.map((/** @type {any} */ note, /** @type {number} */ index) => html`<li key=${index}><${Icon} name="info" size=${16} /><span>${told("notes", note)}</span></li>`)}
    </ul>`}
    <div id=${id}>${isOpen && html`<${Settings} job=${job} />`}</div>
  </div>`;
}
