/** Settings of the visitor's own: saved under a name in this browser, and taken over again. */
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { removeSettings, saveSettings, savedSettings } from "../core/prompts.js";
import { edit, form, undo } from "../core/store.js";
import { Dialog } from "../shell/dialog.js";
import { TextField } from "../shell/field.js";
import { Icon } from "../shell/icon.js";
import { toast } from "../shell/toasts.js";

/** @param {{onClose: () => void}} props */
export function SavedDialog({ onClose }) {
  const [name, setName] = useState("");
  const use = (/** @type {import("../core/prompts.js").Saved} */ saved) => {
    edit(saved.values);
    onClose();
    toast(t("form.saved.used", { name: saved.name }), { label: t("form.undo"), action: undo });
  };
  const save = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!name.trim()) return;
    saveSettings(name.trim(), form.value);
    setName("");
  };
  const list = savedSettings.value;
  return html`<${Dialog} title=${t("form.saved.title")} onClose=${onClose}>
    <p class="help">${t("form.saved.empty")}</p>
    <form class="saved-new" onSubmit=${save}>
      <${TextField} id="saved-name" label=${t("form.saved.name")} value=${name} maxLength=${60} onChange=${(/** @type {string} */ text) => setName(text ?? "")} />
      <button class="button primary" disabled=${!name.trim()}>${t("form.saved.save")}</button>
    </form>
    <ul class="saved-list">
      ${list.map(
        (one) => html`<li key=${one.name}>
          <span>${one.name}</span>
          <button type="button" class="button" onClick=${() => use(one)}>${t("form.saved.use")}</button>
          <button type="button" class="button plain icon" aria-label=${t("form.saved.remove", { name: one.name })} title=${t("form.saved.remove", { name: one.name })} onClick=${() => removeSettings(one.name)}>
            <${Icon} name="trash" size=${18} />
          </button>
        </li>`,
      )}
    </ul>
  <//>`;
}
