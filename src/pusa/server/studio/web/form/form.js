/** The form: what the video is made from and how, in the order in which people think of it. */
import { html, useEffect, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { generate } from "../core/submit.js";
import { edit, emptyForm, form, model, undo } from "../core/store.js";
import { Group } from "../shell/group.js";
import { Icon } from "../shell/icon.js";
import { toast } from "../shell/toasts.js";
import { Advanced } from "./advanced.js";
import { Control } from "./control.js";
import { Examples } from "./examples.js";
import { changedCount } from "./fields.js";
import { addFiles, filesOf } from "./files.js";
import { Inputs } from "./inputs.js";
import { OursDialog } from "./ours.js";
import { Prompt, PromptHints } from "./prompt.js";
import { Row } from "./row.js";
import { SavedDialog } from "./saved.js";
import { Submit } from "./submit.js";

const TABS = /** @type {const} */ (["image", "images", "video", "text"]);
const MODES = /** @type {const} */ (["complete", "extend", "transition", "loop"]);

function startAnew() {
  edit(emptyForm());
  toast(t("form.reset_done"), { label: t("form.undo"), action: undo });
}

/** Files that are dropped or pasted belong to the open tab. */
function useFiles() {
  const [held, setHeld] = useState(false);
  useEffect(() => {
    const onPaste = (/** @type {ClipboardEvent} */ event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      void addFiles(files);
    };
    document.addEventListener("paste", onPaste);
    return () => document.removeEventListener("paste", onPaste);
  }, []);
  const over = (/** @type {DragEvent} */ event) => {
    if (!event.dataTransfer?.types.some((type) => type === "Files" || type === "application/x-pusa-video")) return;
    event.preventDefault();
    setHeld(true);
  };
  const leave = (/** @type {DragEvent} */ event) => {
    const into = /** @type {Node|null} */ (event.relatedTarget);
    if (!(/** @type {Element} */ (event.currentTarget).contains(into))) setHeld(false);
  };
  const drop = (/** @type {DragEvent} */ event) => {
    event.preventDefault();
    setHeld(false);
    void addFiles(filesOf(event.dataTransfer));
  };
  return { held, over, leave, drop };
}

/** @param {KeyboardEvent} event */
function onKeyDown(event) {
  const isOther = /** @type {Element} */ (event.target).closest("dialog"); // has buttons of its own
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || isOther) return;
  event.preventDefault();
  /** @type {HTMLElement|null} */ (document.activeElement)?.blur(); // what is typed is taken over first
  void generate();
}

function Mode() {
  const { mode } = form.value;
  return html`<${Group}
    label=${t("form.mode.label")}
    hidden
    value=${mode}
    options=${MODES.map((value) => ({ value, label: t(`form.mode.${value}`), help: t(`form.mode_help.${value}`) }))}
    onChange=${(/** @type {any} */ value) => edit({ mode: value })}
    help=${t(`form.mode_help.${mode}`)}
    class="mode"
  />`;
}

/** Buttons that open what is not needed at first, and what they open. */
function More() {
  const [open, setOpen] = useState("");
  const [saved, setSaved] = useState(false);
  const button = (/** @type {"control"|"advanced"} */ name, /** @type {string} */ icon) => {
    const count = model.value ? changedCount(form.value, name) : 0;
    return html`<button
      type="button"
      class="button plain more-button"
      id=${`open-${name}`}
      aria-expanded=${String(open === name)}
      aria-controls=${`more-${name}`}
      onClick=${() => setOpen(open === name ? "" : name)}
    >
      <${Icon} name=${icon} size=${18} />${t(`form.${name}`)}
      ${count > 0 && html`<span class="count" aria-label=${t("form.changed", { count })}>${count}</span>`}
      <${Icon} name=${open === name ? "up" : "down"} size=${14} />
    </button>`;
  };
  return html`<div class="more">
    <div class="more-bar">
      ${button("control", "sliders")}${button("advanced", "gear")}
      <span class="space"></span>
      <button type="button" class="button plain icon" aria-label=${t("form.saved.open")} title=${t("form.saved.open")} onClick=${() => setSaved(true)}>
        <${Icon} name="bookmark" size=${18} />
      </button>
      <button type="button" class="button plain icon" aria-label=${t("form.reset")} title=${t("form.reset")} onClick=${startAnew}>
        <${Icon} name="new" size=${18} />
      </button>
    </div>
    <div class="more-panel" id="more-control" hidden=${open !== "control"}>${open === "control" && html`<${Control} />`}</div>
    <div class="more-panel" id="more-advanced" hidden=${open !== "advanced"}>${open === "advanced" && html`<${Advanced} />`}</div>
    ${saved && html`<${SavedDialog} onClose=${() => setSaved(false)} />`}
  </div>`;
}

export function Form() {
  const { tab } = form.value;
  const { held, over, leave, drop } = useFiles();
  return html`<section
    class=${`form ${held ? "held" : ""}`}
    aria-label=${t("form.title")}
    onKeyDown=${onKeyDown}
    onDragOver=${over}
    onDragLeave=${leave}
    onDrop=${drop}
  >
    <${Group}
      role="tablist"
      id="tab"
      controls="tab-panel"
      label=${t("form.tabs.label")}
      hidden
      value=${tab}
      options=${TABS.map((value) => ({ value, label: t(`form.tabs.${value}`) }))}
      onChange=${(/** @type {any} */ value) => edit({ tab: value })}
      class="tabs"
    />
    <div class="panel" role="tabpanel" id="tab-panel" aria-labelledby=${`tab-${tab}`}>
      ${tab === "video" && html`<${Mode} />`}
      <div class=${`compose ${tab}`}><${Prompt} /><${Inputs} /></div>
      <${PromptHints} />
      <${Row} />
    </div>
    <${Submit} />
    <${More} />
    <${Examples} />
    <${OursDialog} />
  </section>`;
}
