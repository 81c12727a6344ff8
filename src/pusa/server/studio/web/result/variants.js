/** Variants of one click, side by side and in step: the ones to keep are marked, the others deleted. */
import { html } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { cancel, removeAll, setFavourite } from "./actions.js";
import { Bar, Preview, shortWords } from "./making.js";
import { Controls, playerKeys } from "./player.js";
import { Act, fpsOf } from "./result.js";
import { compare, show } from "./selection.js";
import { isBusy, isPlayable, ratioOf, stateOf } from "./states.js";
import { Clip, useTransport } from "./transport.js";

/** What is seen of one. @param {{job: any, state: string, transport: import("./transport.js").Transport, number: number}} props */
function Picture({ job, state, transport, number }) {
  if (isBusy(job)) return html`<${Preview} job=${job} state=${state} />`;
  if (state !== "completed") {
    return html`<span class="variant-words">${t(`result.${state}`)}${state === "failed" && html`<small>${told("errors", job.error ?? {})}</small>`}</span>`;
  }
  return html`<${Clip} transport=${transport} job=${job} poster label=${t("result.variant", { number })} />`;
}

/** @param {{job: any, number: number, transport: import("./transport.js").Transport}} props */
function Variant({ job, number, transport }) {
  const state = stateOf(job);
  const name = t("result.variant", { number });
  const keep = t(job.favourite ? "result.unkeep_one" : "result.keep_one", { number });
  return html`<li class=${`variant ${job.favourite ? "kept" : ""}`} style=${`--ratio:${ratioOf(job)}`}>
    <button type="button" class="variant-picture" aria-label=${t("result.open_variant", { number })} onClick=${() => show([job.id])}>
      <${Picture} job=${job} state=${state} transport=${transport} number=${number} />
    </button>
    ${isBusy(job) && html`<${Bar} job=${job} state=${state} label=${name} />`}
    <div class="variant-foot">
      <span class="small number">${number}</span>
      <span class="small quiet number variant-facts">
        ${isBusy(job) ? shortWords(job, state) : t("result.seed_is", { seed: String(job.seed ?? "") })}
      </span>
      <span class="variant-tools">
      ${isPlayable(job) && html`<${Act} bare name=${keep} icon="star" filled=${job.favourite} pressed=${Boolean(job.favourite)} onClick=${() => setFavourite([job], !job.favourite)} />`}
      ${isBusy(job)
        ? html`<${Act} bare name=${t("result.cancel_one", { number })} icon="close" onClick=${() => cancel(job)} />`
        : html`<${Act} bare name=${t("result.delete_one", { number })} icon="trash" onClick=${() => removeAll([job])} />`}
      </span>
    </div>
  </li>`;
}

/** @param {{list: any[]}} props */
export function Variants({ list }) {
  const transport = useTransport(list.map((job) => job.id).join());
  const playable = list.filter(isPlayable);
  const others = playable.filter((job) => !job.favourite);
  const fps = fpsOf(list[0]);
  return html`<div class="player variants" onKeyDown=${(/** @type {KeyboardEvent} */ event) => playerKeys(event, transport, fps)}>
    <ul class="variant-grid" style=${`--count:${list.length}`}>
      ${list.map((job, index) => html`<${Variant} key=${job.id} job=${job} number=${index + 1} transport=${transport} />`)}
    </ul>
    ${playable.length > 0 && html`<${Controls} transport=${transport} fps=${fps} />`}
    <div class="actions">
      ${playable.length === 2 &&
      list.length === 2 &&
      html`<button type="button" class="button" onClick=${() => compare(playable[0].id, playable[1].id)}>
        <${Icon} name="compare" size=${18} />${t("result.compare_two")}
      </button>`}
      ${others.length > 0 &&
      others.length < playable.length &&
      html`<button type="button" class="button" onClick=${() => removeAll(others)}>
        <${Icon} name="trash" size=${18} />${t("result.delete_others", { count: others.length })}
      </button>`}
      <p class="small quiet">${t("result.variants_help")}</p>
    </div>
  </div>`;
}
