/** The page's head: name, state of the model, undo and redo, language, theme, log out. */
import { html } from "../core/dom.js";
import { language, setLanguage, t } from "../core/i18n.js";
import { canRedo, canUndo, connection, model, pageData, prefs, ready, redo, session, setPrefs, undo } from "../core/store.js";
import { Icon } from "./icon.js";
import { Menu } from "./menu.js";
import { NoticeSwitch } from "./notify.js";
import { Toolbar } from "./roving.js";
import { signOut } from "./session.js";

/** Whether the page is dark now: the visitor's choice, else the browser's. */
const isDark = () =>
  prefs.value.theme ? prefs.value.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  setPrefs({ theme });
}

/**
 * What the model does, as a word for styles and a text.
 * @returns {{kind: "ready"|"loading"|"failed"|"away", text: string}}
 */
function modelState() {
  const found = ready.value;
  if (connection.value === "lost") return { kind: "away", text: t("shell.model.away") };
  if (!found) return { kind: "loading", text: t("shell.model.starting") };
  if (found.ready) return { kind: "ready", text: t("shell.model.ready") };
  if (found.stage === "failed") return { kind: "failed", text: t("shell.model.failed") };
  if (found.stage === "no worker") return { kind: "loading", text: t("shell.model.no_worker") };
  return { kind: "loading", text: t("shell.model.loading", { percent: Math.round(found.percent || 0) }) };
}

function ModelState() {
  const { kind, text } = modelState();
  const name = model.value?.id ?? ready.value?.model ?? "";
  return html`<span class=${`model-state ${kind}`} role="status">
    <i aria-hidden="true"></i><span class="model-name">${name}</span><span>${text}</span>
  </span>`;
}

/** @param {{name: string, icon: string, act: () => void, disabled?: boolean}} props */
const Act = ({ name, icon, act, disabled }) =>
  html`<button type="button" class="button plain icon" disabled=${disabled} onClick=${act} aria-label=${name} title=${name}><${Icon} name=${icon} /></button>`;

export function Header() {
  const dark = isDark();
  const theme = t(dark ? "shell.theme.light" : "shell.theme.dark");
  const languages = Object.entries(pageData.languages).map(([code, name]) => ({
    label: name,
    checked: code === language(),
    act: () => void setLanguage(code),
  }));
  return html`<header class="header">
    <a class="skip" href="#stage">${t("shell.skip")}</a>
    <h1 class="brand"><${Mark} /><span class="brand-name">pusa</span> <span class="quiet">${t("shell.tagline")}</span></h1>
    <span class="space"></span>
    <${ModelState} />
    <${Toolbar} label=${t("shell.tools")}>
      <${Act} name=${t("shell.undo")} icon="undo" disabled=${!canUndo.value} act=${undo} />
      <${Act} name=${t("shell.redo")} icon="redo" disabled=${!canRedo.value} act=${redo} />
      <${Menu} label=${t("shell.language")} icon="globe" entries=${languages} />
      <${NoticeSwitch} />
      <${Act} name=${theme} icon=${dark ? "sun" : "moon"} act=${toggleTheme} />
      ${session.value?.keys_required && html`<${Act} name=${t("shell.log_out")} icon="logout" act=${signOut} />`}
    <//>
  </header>`;
}

/** Five frames, from noise to a clear one. */
export function Mark() {
  return html`<span class="mark" aria-hidden="true">${[0, 1, 2, 3, 4].map((n) => html`<i key=${n} style=${`--n:${n}`}></i>`)}</span>`;
}
