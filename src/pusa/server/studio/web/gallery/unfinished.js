/** Videos that failed or were cancelled, folded away. */
import { html } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { removeAll, retry, again } from "../result/actions.js";
import { show } from "../result/selection.js";
import { stateOf } from "../result/states.js";
import { ago } from "../result/words.js";
import { unfinished } from "./state.js";

/** @param {{job: any}} props */
function Row({ job }) {
  const failed = stateOf(job) === "failed";
  const prompt = job.prompt || t("result.no_prompt");
  return html`<li class="unfinished-row">
    <button type="button" class="unfinished-open" onClick=${() => show([job.id])}>
      <span class="unfinished-prompt">${prompt}</span>
      <span class="quiet small">${failed ? told("errors", job.error ?? {}) : t("result.cancelled")} · ${ago(job.created_at)}</span>
    </button>
    <button type="button" class="button" aria-label=${t("gallery.again_one", { prompt })} onClick=${() => (failed ? retry(job) : again(job))}>
      <${Icon} name="replace" size=${18} />${t("result.again")}
    </button>
    <button type="button" class="button plain icon" aria-label=${t("gallery.delete_one", { prompt })} title=${t("result.delete")} onClick=${() => removeAll([job])}>
      <${Icon} name="trash" size=${18} />
    </button>
  </li>`;
}

export function Unfinished() {
  const list = unfinished.value;
  if (!list.length) return null;
  return html`<details class="unfinished">
    <summary>${t("gallery.unfinished", { count: list.length })}</summary>
    <ul>
      ${list.map((job) => html`<${Row} key=${job.id} job=${job} />`)}
    </ul>
    ${list.length > 1 &&
    html`<button type="button" class="button" onClick=${() => removeAll(list)}>
      <${Icon} name="trash" size=${18} />${t("gallery.delete_unfinished")}
    </button>`}
  </details>`;
}
