/** The stage: what is being made, the result, the variants or two results against each other. */
import { html, useEffect, useRef } from "../core/dom.js";
import { startFeed } from "../core/feed.js";
import { t } from "../core/i18n.js";
import { jobs, selected } from "../core/store.js";
import { startNotices } from "../shell/notify.js";
import { Making } from "./making.js";
import { Ended, Result } from "./result.js";
import { comparison, gone, startSelection } from "./selection.js";
import { isBusy, named, spoken, stateOf } from "./states.js";
import { Variants } from "./variants.js";
import { Welcome } from "./welcome.js";
import { Wipe } from "./wipe.js";

const BARS = 90; // pixels at the top and at the bottom of the window that may be covered

/** Tell a screen reader how far it is, every ten percent. @param {{list: any[]}} props */
function Spoken({ list }) {
  const said = spoken(list);
  return html`<p class="visually-hidden" role="status">${said && t(`result.spoken.${said.key}`, said.values)}</p>`;
}

/** @param {{list: any[], ids: string[]}} props */
function Content({ list, ids }) {
  if (!ids.length) return html`<${Welcome} />`;
  if (!list.length) {
    if (ids.every((id) => gone.value.has(id))) return html`<${Ended} title=${t("result.gone")} text=${t("result.gone_text")} />`;
    return html`<div class="screen" aria-busy="true"></div>`; // on its way
  }
  if (ids.length > 1) return html`<${Variants} list=${list} />`;
  const [job] = list;
  const pair = comparison.value;
  const second = pair && pair.first === job.id ? pair.second : null;
  if (second && jobs.value.has(second)) return html`<${Wipe} key=${`${job.id} ${second}`} first=${job} second=${jobs.value.get(second)} />`;
  const state = stateOf(job);
  if (isBusy(job)) return html`<${Making} key=${job.id} job=${job} state=${state} />`;
  return html`<${Result} key=${job.id} job=${job} state=${state} />`;
}

export function Stage() {
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  useEffect(() => {
    startSelection();
    startFeed();
    startNotices();
  }, []);
  const ids = selected.value;
  const second = comparison.value?.second ?? "";
  const list = named(jobs.value, ids);
  const isThere = list.length > 0;
  useEffect(() => {
    if (isThere) reveal(ref.current);
  }, [ids.join(), second, isThere]);
  return html`<section class="stage" id="stage" ref=${ref} tabindex="-1" aria-labelledby="stage-title">
    <h2 class="visually-hidden" id="stage-title">${t("result.title")}</h2>
    <${Spoken} list=${list} />
    <${Content} list=${list} ids=${ids} />
  </section>`;
}

/** Scroll to the stage where less than half of it is seen: on a phone, or from the gallery. @param {HTMLElement|null} stage */
function reveal(stage) {
  if (!stage) return;
  const { top, bottom, height } = stage.getBoundingClientRect();
  const seen = Math.min(bottom, innerHeight - BARS) - Math.max(top, BARS);
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  if (seen < height / 2) stage.scrollIntoView({ block: "start", behavior });
}
