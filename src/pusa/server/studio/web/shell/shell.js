/** Where everything stands: header, form beside the stage, the timeline across the page, queue, gallery. */
import { html, useEffect } from "../core/dom.js";
import { write } from "../core/persist.js";
import { redo, undo } from "../core/store.js";
import { t } from "../core/i18n.js";
import { addFiles, filesOf } from "../form/files.js";
import { Form } from "../form/form.js";
import { Gallery } from "../gallery/gallery.js";
import { Queue } from "../gallery/queue.js";
import { Stage } from "../result/stage.js";
import { Timeline } from "../timeline/timeline.js";
import { Banner } from "./banner.js";
import { Header } from "./header.js";
import { Login } from "./login.js";
import { needsKey } from "./session.js";
import { Toasts, toast } from "./toasts.js";

/** Ctrl+Z and Ctrl+Shift+Z are the form's; fields of other parts have `data-own-undo`. @param {KeyboardEvent} event */
function onKey(event) {
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
  const key = event.key.toLowerCase();
  const isOther = /** @type {Element} */ (event.target).closest?.("dialog, [data-own-undo]");
  if (isOther || (key !== "z" && key !== "y")) return;
  event.preventDefault();
  if (key === "y" || event.shiftKey) redo();
  else undo();
}

/** Files that are dropped beside the form are meant for it; the browser would leave the page for them. @param {DragEvent} event */
function onDrag(event) {
  if (event.defaultPrevented || !event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  const isOther = needsKey() || document.querySelector("dialog[open]");
  if (event.type === "drop" && !isOther) void addFiles(filesOf(event.dataTransfer));
}

export function Shell() {
  useEffect(() => {
    addEventListener("keydown", onKey);
    addEventListener("dragover", onDrag);
    addEventListener("drop", onDrag);
    if (!write("pusa.probe", 1)) toast(t("shell.storage"), { kind: "problem", seconds: 12 });
    return () => {
      removeEventListener("keydown", onKey);
      removeEventListener("dragover", onDrag);
      removeEventListener("drop", onDrag);
    };
  }, []);
  if (needsKey()) return html`<${Login} /><${Toasts} />`;
  return html`
    <${Header} />
    <${Banner} />
    <main class="layout" aria-label=${t("shell.main")}>
      <div class="workbench">
        <${Form} />
        <${Stage} />
      </div>
      <${Timeline} />
      <${Queue} />
      <${Gallery} />
    </main>
    <${Toasts} />
  `;
}
