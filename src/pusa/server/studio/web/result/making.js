/** A video that waits or is being made: stage, steps, time left, the newest preview. */
import { html } from "../core/dom.js";
import { t, has } from "../core/i18n.js";
import { previews, ready } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { cancel } from "./actions.js";
import { percentOf, ratioOf } from "./states.js";
import { inputUrl, timeLeft } from "./words.js";

/** What happens with it, in words: the main ones and what is added. @param {any} job @param {string} state */
export function progressWords(job, state) {
  if (state === "stopping") return [t("result.stopping"), ""];
  if (state === "sending") return [t("result.sending"), ""];
  if (state === "queued") {
    if (job.queue_position > 0) return [t("result.queued"), t("result.ahead", { count: job.queue_position })];
    return [t("result.queued"), t(ready.value && !ready.value.ready ? "result.queued_loading" : "result.next")];
  }
  const stage = job.stage && has(`result.stages.${job.stage}`) ? t(`result.stages.${job.stage}`) : t("result.stages.start");
  const step = job.stage === "denoise" && job.steps ? ` · ${t("result.step", { step: job.step, steps: job.steps })}` : "";
  const left = job.seconds_left !== null && job.step > 0 ? t("result.left", { time: timeLeft(job.seconds_left) }) : "";
  return [stage + step, left];
}

/** The same in few words. @param {any} job @param {string} state */
export const shortWords = (job, state) =>
  state === "running" && job.stage === "denoise" && job.steps
    ? t("result.step", { step: job.step, steps: job.steps })
    : progressWords(job, state)[0];

/** @param {{job: any, state: string, label: string}} props */
export function Bar({ job, state, label }) {
  const waits = state === "queued" || state === "sending";
  const value = percentOf(job);
  return html`<div
    class=${waits ? "bar waits" : "bar"}
    role="progressbar"
    aria-label=${label}
    aria-valuemin="0"
    aria-valuemax="100"
    aria-valuenow=${waits ? undefined : value}
  >
    <i style=${`width:${waits ? 0 : value}%`}></i>
  </div>`;
}

/**
 * The newest preview; before the first one what the video is made from, under grain.
 * @param {{job: any, state: string, width?: number}} props  `width`: of the picture at most, in pixels
 */
export function Preview({ job, state, width = 1024 }) {
  const image = previews.value.get(job.id);
  const given = !image && job.inputs > 0;
  return html`<div class=${`preview ${state} ${given ? "given" : ""}`} style=${`--ratio:${ratioOf(job)}`}>
    ${given && html`<img src=${inputUrl(job, width)} alt="" decoding="async" draggable=${false} onError=${hide} />`}
    ${image ? html`<img src=${image} alt=${t("result.preview")} />` : html`<span class="grain" aria-hidden="true"></span>`}
  </div>`;
}

/** A picture that is not there any more leaves the grain. @param {any} event */
const hide = (event) => (event.currentTarget.hidden = true);

/** @param {{job: any, state: string}} props */
export function Making({ job, state }) {
  const [what, more] = progressWords(job, state);
  return html`
    <div class="screen">
      <div class="fit"><${Preview} job=${job} state=${state} /></div>
    </div>
    <div class="making">
      <p class="making-line">
        <strong>${what}</strong>
        <span class="quiet number">${more}</span>
      </p>
      <div class="making-bar">
        <${Bar} job=${job} state=${state} label=${t("result.progress")} />
        <span class="number percent" aria-hidden="true">${state === "running" ? `${percentOf(job)} %` : ""}</span>
        <button type="button" class="button" disabled=${state === "stopping" || state === "sending"} onClick=${() => cancel(job)}>
          <${Icon} name="close" size=${16} />${t("result.cancel")}
        </button>
      </div>
      ${job.prompt && html`<p class="quiet small making-prompt">${job.prompt}</p>`}
    </div>
  `;
}
