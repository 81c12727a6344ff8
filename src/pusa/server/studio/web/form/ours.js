/** Ask about a file that pusa made: it holds all of its settings. */
import { html } from "../core/dom.js";
import { editFile } from "../core/editing.js";
import { t, told } from "../core/i18n.js";
import { Dialog } from "../shell/dialog.js";
import { toast } from "../shell/toasts.js";
import { ours } from "./files.js";

export function OursDialog() {
  const found = ours.value;
  if (!found) return null;
  const close = () => (ours.value = null);
  const use = () => {
    close();
    found.use();
  };
  const take = async () => {
    close();
    try {
      await editFile(found.item.source.file_id ?? "");
    } catch (error) {
      toast(told("errors", /** @type {any} */ (error)), { kind: "problem" });
    }
  };
  return html`<${Dialog} title=${t("form.inputs.ours.title")} onClose=${close}
    actions=${html`<button type="button" class="button" onClick=${use}>${t("form.inputs.ours.use")}</button>
      <button type="button" class="button primary" onClick=${take}>${t("form.inputs.ours.take")}</button>`}>
    <p>${t("form.inputs.ours.text", { name: found.item.name })}</p>
  <//>`;
}
