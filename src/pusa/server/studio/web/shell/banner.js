/** One line across the page about what stands in the way: the connection, the model, a press that was not sent. */
import { html } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { discardUnsent, sendUnsent, unsent } from "../core/submit.js";
import { connection, ready } from "../core/store.js";
import { checkConnection } from "./connection.js";
import { Icon } from "./icon.js";

/** @param {{kind: string, icon: string, text: string, detail?: string, raw?: string, children?: any}} props  `raw`: what the program itself says, in English */
function Line({ kind, icon, text, detail, raw, children }) {
  return html`<div class=${`banner ${kind}`} role=${kind === "bad" ? "alert" : "status"}>
    <${Icon} name=${icon} /><span class="banner-text"><b>${text}</b> ${detail} ${raw && html`<code lang="en">${raw}</code>`}</span>${children}
  </div>`;
}

export function Banner() {
  const waiting = unsent.value;
  if (connection.value === "lost") {
    return html`<${Line} kind="bad" icon="offline" text=${t("shell.lost.title")} detail=${t(waiting.length ? "shell.lost.kept" : "shell.lost.text", { count: waiting.length })}>
      <button type="button" class="button" onClick=${checkConnection}>${t("shell.lost.again")}</button>
    <//>`;
  }
  if (waiting.length) {
    return html`<${Line} kind="ask" icon="history" text=${t("shell.unsent.title", { count: waiting.length })} detail=${waiting[0].body.prompt}>
      <button type="button" class="button primary" onClick=${sendUnsent}>${t("shell.unsent.send")}</button>
      <button type="button" class="button" onClick=${discardUnsent}>${t("shell.unsent.discard")}</button>
    <//>`;
  }
  if (ready.value?.stage === "failed") {
    return html`<${Line} kind="bad" icon="warning" text=${t("shell.model_failed.title")} detail=${told("errors", ready.value.error ?? {})} raw=${ready.value.error?.message} />`;
  }
  return null;
}
