/** A video that is finished, or has failed, was cancelled or has expired; what can be done with it; its settings. */
import { editVideo, extendVideo, useFrame } from "../core/editing.js";
import { html, useEffect, useRef, useState } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { jobs, model } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { Menu } from "../shell/menu.js";
import { Toolbar } from "../shell/roving.js";
import { again, copy, makeFinal, removeAll, requestOf, requests, retry, save, saveMade, setFavourite, tellError, vary } from "./actions.js";
import { Controls, playerKeys } from "./player.js";
import { compare, comparison, isPicking, show } from "./selection.js";
import { About } from "./settings.js";
import { isPlayable, siblings } from "./states.js";
import { Clip, movesLess, useTransport } from "./transport.js";
import { contentUrl } from "./words.js";

/** Frames in a second of a video, as far as it is known without its request. @param {any} job @returns {number} */
export const fpsOf = (job) => requests.get(job.id)?.fps || model.value?.defaults?.fps || 24;

/** @param {{name: string, icon: string, onClick: () => void, primary?: boolean, bare?: boolean, pressed?: boolean, filled?: boolean}} props */
export function Act({ name, icon, onClick, primary = false, bare = false, pressed, filled }) {
  return html`<button
    type="button"
    class=${`button ${primary ? "primary" : ""} ${bare ? "plain icon" : ""}`}
    aria-label=${bare ? name : undefined}
    aria-pressed=${pressed === undefined ? undefined : String(pressed)}
    title=${bare ? name : undefined}
    onClick=${onClick}
  >
    <${Icon} name=${icon} size=${18} filled=${filled} />${bare ? null : html`<span>${name}</span>`}
  </button>`;
}

/** @param {{title: string, text?: string, bad?: boolean, children?: any}} props */
export function Ended({ title, text, bad = false, children }) {
  return html`<div class="screen words" role=${bad ? "alert" : undefined}>
    ${bad && html`<${Icon} name="warning" size=${28} />`}
    <p class="words-title">${title}</p>
    ${text && html`<p class="quiet words-text">${text}</p>`}
    ${children}
  </div>`;
}

/** @param {any} job */
export function downloads(job) {
  const made = /** @type {const} */ ([["gif", "film"], ["webp", "film"], ["last_frame", "image"], ["contact_sheet", "grid"]]);
  const there = made.filter(([variant]) => variant !== "contact_sheet" || job.has?.includes(variant));
  return [
    { label: t("result.download.video"), icon: "video", act: () => save(contentUrl(job)) },
    ...there.map(([variant, icon]) => ({ label: t(`result.download.${variant}`), icon, act: () => void saveMade(job, variant) })),
  ];
}

/** Take a video, or a part of it, into the form; a failure is told. @param {() => Promise<any>} take */
export async function intoForm(take) {
  try {
    await take();
  } catch (error) {
    tellError(error);
  }
}

/** @param {any} job @param {boolean} playable */
function others(job, playable) {
  const more = playable ? [{ label: t("result.again"), icon: "replace", act: () => void again(job) }] : [];
  return [
    ...more,
    { label: t("result.copy_prompt"), icon: "copy", disabled: !job.prompt, act: () => copy(job.prompt, t("result.copied_prompt")) },
    {
      label: t("result.copy_seed"),
      icon: "dice",
      disabled: job.seed === null || job.seed === undefined,
      act: () => copy(String(job.seed), t("result.copied_seed")),
    },
  ];
}

/** Begin to compare a video, or leave it. @param {any} job */
function togglePicking(job) {
  if (isPicking()) return void (comparison.value = null);
  compare(job.id);
  document.querySelector(".gallery")?.scrollIntoView({ behavior: movesLess() ? "auto" : "smooth" });
}

/** @param {{job: any, state: string, transport: import("./transport.js").Transport}} props */
function Actions({ job, state, transport }) {
  const playable = isPlayable(job);
  const remake = [
    html`<${Act} name=${t("result.edit")} icon="edit" onClick=${() => intoForm(() => editVideo(job.id))} />`,
    html`<${Act} name=${t("result.vary")} icon="dice" onClick=${() => vary(job)} />`,
    !playable && state !== "failed" && html`<${Act} name=${t("result.again")} icon="replace" onClick=${() => again(job)} />`,
  ];
  const frame = () => Math.floor(transport.time.value * fpsOf(job) + 0.01);
  const use = playable && [
    html`<${Act} name=${t("result.extend")} icon="extend" onClick=${() => intoForm(() => extendVideo(job.id))} />`,
    html`<${Act} name=${t("result.use_frame")} icon="camera" onClick=${() => intoForm(() => useFrame(job.id, frame()))} />`,
  ];
  return html`<${Toolbar} label=${t("result.actions")} class="actions">
    ${playable && job.draft && html`<${Act} name=${t("result.final")} icon="wand" primary onClick=${() => makeFinal(job)} />`}
    ${state === "failed" && html`<${Act} name=${t("result.retry")} icon="replace" primary onClick=${() => retry(job)} />`}
    ${remake} ${use}
    <span class="actions-end">
      ${playable &&
      html`<${Act} bare name=${t(job.favourite ? "result.unfavourite" : "result.favourite")} icon="star" filled=${job.favourite} pressed=${Boolean(job.favourite)} onClick=${() => setFavourite([job], !job.favourite)} />
        <${Act} bare name=${t("result.compare")} icon="compare" pressed=${isPicking()} onClick=${() => togglePicking(job)} />`}
      <${Act} bare name=${t("result.delete")} icon="trash" onClick=${() => removeAll([job])} />
      <${Menu} label=${t("gallery.more")} entries=${others(job, playable)} />
      ${playable && html`<${Menu} label=${t("result.download.label")} icon="download" wordless=${false} class="button" entries=${downloads(job)} />`}
    </span>
  <//>`;
}

/** Where it stands among the variants that were asked for with it. @param {{job: any}} props */
function Siblings({ job }) {
  const all = siblings(jobs.value, job);
  if (all.length < 2) return null;
  const at = all.findIndex((other) => other.id === job.id);
  const go = (/** @type {number} */ by) => show([all[(at + by + all.length) % all.length].id]);
  return html`<div class="siblings">
    <${Act} bare name=${t("result.variant_before")} icon="left" onClick=${() => go(-1)} />
    <span class="small number">${t("result.variant_of", { number: at + 1, count: all.length })}</span>
    <${Act} bare name=${t("result.variant_after")} icon="right" onClick=${() => go(1)} />
    <${Act} bare name=${t("result.variants_all")} icon="grid" onClick=${() => show(all.map((other) => other.id))} />
  </div>`;
}

/** @param {{job: any, transport: import("./transport.js").Transport}} props */
function Player({ job, transport }) {
  const ref = useRef(/** @type {HTMLElement|null} */ (null));
  const [, setKnown] = useState(false);
  useEffect(() => {
    requestOf(job).then(() => setKnown(true), () => {}); // without it frames are counted at the model's own speed
  }, [job.id]);
  const fps = fpsOf(job);
  const label = t("result.player", { prompt: job.prompt || t("result.no_prompt") });
  return html`<div class="player" ref=${ref} onKeyDown=${(/** @type {KeyboardEvent} */ event) => playerKeys(event, transport, fps)}>
    <div class="screen" onClick=${() => transport.toggle()}>
      <${Clip} transport=${transport} job=${job} poster label=${label} />
    </div>
    <${Controls} transport=${transport} fps=${fps} full=${() => ref.current} />
  </div>`;
}

/** @param {{job: any, state: string}} props */
export function Result({ job, state }) {
  const transport = useTransport(job.id);
  return html`
    ${state === "completed" && html`<${Player} job=${job} transport=${transport} />`}
    ${state === "failed" && html`<${Ended} bad title=${t("result.failed")} text=${told("errors", job.error ?? {})} />`}
    ${state === "cancelled" && html`<${Ended} title=${t("result.cancelled")} text=${t("result.cancelled_text")} />`}
    ${state === "expired" && html`<${Ended} title=${t("result.expired")} text=${t("result.expired_text")} />`}
    ${isPicking() &&
    html`<p class="hint" role="status">
      <${Icon} name="compare" size=${18} /><span>${t("result.pick")}</span>
      <button type="button" class="button plain" onClick=${() => (comparison.value = null)}>${t("result.pick_cancel")}</button>
    </p>`}
    <${Actions} job=${job} state=${state} transport=${transport} />
    <${About} job=${job} beside=${html`<${Siblings} job=${job} />`} />
  `;
}
