/** Generate, what it would need above it, and what stood in its way. */
import { html, signal, useEffect } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { post } from "../core/api.js";
import { estimateBody } from "../core/request.js";
import { generate, offReason } from "../core/submit.js";
import { connection, edit, form, jobs, model, problem, ready, uploads } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { bytesText, durationText } from "./units.js";

const WAIT_MS = 350; // after the last edit
const estimate = signal(/** @type {any} */ (null)); // the answer, or {error}

/** Ask what the form would need, once it has rested. */
function useEstimate() {
  const body = model.value ? JSON.stringify(estimateBody(form.value, model.value)) : "";
  const isReady = Boolean(ready.value?.ready); // a worker's machine is known once it has loaded the model
  const away = connection.value === "lost";
  const made = [...jobs.value.values()].filter((job) => job.status === "completed").length; // they tell the time
  useEffect(() => {
    if (!body || away) return;
    const stop = new AbortController();
    const timer = setTimeout(async () => {
      try {
        estimate.value = await post("/v1/videos/estimate", JSON.parse(body), { signal: stop.signal });
      } catch (error) {
        if (!stop.signal.aborted) estimate.value = { error };
      }
    }, WAIT_MS);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [body, isReady, away, made]);
}

/** @param {Record<string, number>} found @returns {number} bytes of the fullest card */
const most = (found) => Math.max(0, ...Object.values(found ?? {}));

function Estimate() {
  useEstimate();
  const found = estimate.value;
  if (uploads.value.length) return html`<p class="estimate" id="estimate">${t("form.estimate.uploading")}</p>`;
  if (!found || found.error?.status === 0) return html`<p class="estimate" id="estimate"></p>`;
  if (found.error) return html`<p class="estimate bad" id="estimate">${told("errors", found.error)}</p>`;
  if (found.problem) return html`<p class="estimate bad" id="estimate">${told("errors", found.problem_detail)}</p>`;
  const gpu = most(found.gpu_peak_bytes);
  const parts = [
    found.seconds ? t("form.estimate.time", { time: durationText(found.seconds * form.value.variants) }) : t("form.estimate.unknown"),
    gpu ? t("form.estimate.gpu", { memory: bytesText(gpu) }) : "",
    found.ram_peak_bytes ? t("form.estimate.ram", { memory: bytesText(found.ram_peak_bytes) }) : "",
  ];
  return html`<p class="estimate" id="estimate"><span class="visually-hidden">${t("form.estimate.label")} · </span>${parts.filter(Boolean).join(" · ")}</p>`;
}

function Problem() {
  const found = problem.value;
  if (!found) return null;
  const text = found.key ? t(found.key, found.values) : told("errors", found);
  const fix =
    found.fix &&
    (() => {
      edit(found.fix);
      found.done?.();
    });
  return html`<div class="problem" role="alert">
    <${Icon} name="warning" />
    <p><b>${t("form.problem.title")}.</b> ${text}</p>
    ${fix && html`<button type="button" class="button" onClick=${fix}>${t(found.fixKey ?? "form.problem.use_last")}</button>`}
    <button type="button" class="button plain icon" aria-label=${t("shell.close")} onClick=${() => (problem.value = null)}><${Icon} name="close" size=${16} /></button>
  </div>`;
}

export function Submit() {
  const off = offReason();
  const count = form.value.variants;
  return html`<div class="submit">
    <${Problem} />
    <div class="submit-bar">
      <${Estimate} />
      <button type="button" class="button primary" id="generate" disabled=${off !== null} title=${t(off ?? "form.generate_keys")} aria-describedby="estimate" onClick=${generate}>
        ${count > 1 ? t("form.generate_many", { count }) : t("form.generate")}
      </button>
    </div>
  </div>`;
}
