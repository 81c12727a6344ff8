/** The strip of what runs and waits: how far it is, in which order it comes, and how it is cancelled. */
import { post } from "../core/api.js";
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { jobs, selected } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { Icon } from "../shell/icon.js";
import { cancel, cancelAll, learn, tellError } from "../result/actions.js";
import { Bar, Preview, progressWords, shortWords } from "../result/making.js";
import { show } from "../result/selection.js";
import { stateOf } from "../result/states.js";
import { after, queueOrder } from "./model.js";
import { useOrder } from "./order.js";

/** @param {{job: any, handle: any, place: number}} props  `place`: among those that wait, from 1 */
function Waiting({ job, handle, place }) {
  const state = stateOf(job);
  const [, more] = progressWords(job, state);
  const prompt = job.prompt || t("result.no_prompt");
  return html`<li class=${`queue-job ${state}`} data-order=${job.id}>
    <button type="button" class="queue-open" aria-current=${selected.value.includes(job.id) ? "true" : undefined} aria-label=${t("gallery.open", { prompt })} onClick=${() => show([job.id])}>
      <${Preview} job=${job} state=${state} width=${320} />
      ${place > 0 && html`<span class="queue-place number" aria-hidden="true">${place}</span>`}
    </button>
    <div class="queue-words">
      <p class="queue-prompt" title=${prompt}>${prompt}</p>
      <p class="quiet small number queue-what">${shortWords(job, state)}</p>
      ${more && html`<p class="quiet small number">${more}</p>`}
      ${state === "running" && html`<${Bar} job=${job} state=${state} label=${prompt} />`}
    </div>
    <div class="queue-tools">
      <button type="button" class="button plain icon" disabled=${state === "stopping" || state === "sending"} aria-label=${t("gallery.cancel_one", { prompt })} title=${t("result.cancel")} onClick=${() => cancel(job)}>
        <${Icon} name="close" size=${18} />
      </button>
      ${handle}
    </div>
  </li>`;
}

/** @param {any[]} waiting @param {string[]} order @param {string} id */
async function move(waiting, order, id) {
  const places = waiting.map((job) => job.queue_position).sort((a, b) => a - b);
  const byId = new Map(waiting.map((job) => [job.id, job]));
  learn(order.map((other, index) => ({ ...byId.get(other), queue_position: places[index] })));
  try {
    await post(`/v1/videos/${id}/move`, { before: after(order, id) });
  } catch (error) {
    learn(waiting);
    tellError(error);
  }
}

/** @param {{count: number, onClose: () => void}} props */
function Sure({ count, onClose }) {
  const yes = () => {
    onClose();
    void cancelAll();
  };
  return html`<${Dialog}
    title=${t("gallery.cancel_all_title", { count })}
    onClose=${onClose}
    actions=${html`<button type="button" class="button" onClick=${onClose}>${t("gallery.cancel_all_no")}</button>
      <button type="button" class="button danger" onClick=${yes}>${t("gallery.cancel_all_yes")}</button>`}
  >
    <p>${t("gallery.cancel_all_text")}</p>
  <//>`;
}

export function Queue() {
  const [asks, setAsks] = useState(false);
  const list = queueOrder(jobs.value.values());
  const waiting = list.filter((job) => job.status === "queued" && !job.local);
  const running = list.filter((job) => job.status !== "queued" || job.local);
  const { order, list: ref, handle } = useOrder(
    waiting.map((job) => job.id),
    (next, id) => void move(waiting, next, id),
  );
  if (!list.length) return html`<section class="queue" hidden></section>`;
  const inOrder = order.flatMap((id) => waiting.find((job) => job.id === id) ?? []);
  return html`<section class="queue" aria-labelledby="queue-title">
    <div class="queue-head">
      <h2 id="queue-title">${t("gallery.queue")}</h2>
      <span class="quiet small number">${t("gallery.queue_count", { running: running.length, waiting: waiting.length })}</span>
      ${list.length > 1 &&
      html`<button type="button" class="button" onClick=${() => setAsks(true)}>${t("gallery.cancel_all")}</button>`}
    </div>
    <ol class="queue-strip" ref=${ref}>
      ${running.map((job) => html`<${Waiting} key=${job.id} job=${job} place=${0} />`)}
      ${inOrder.map(
        (job, index) =>
          html`<${Waiting} key=${job.id} job=${job} place=${index + 1} handle=${waiting.length > 1 && handle(job.id, t("gallery.move", { prompt: job.prompt || t("result.no_prompt"), place: index + 1 }))} />`,
      )}
    </ol>
    ${asks && html`<${Sure} count=${list.length} onClose=${() => setAsks(false)} />`}
  </section>`;
}
