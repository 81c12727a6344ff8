/** The page's entry: texts first, then the shell. */
import { html, render } from "./core/dom.js";
import { loadLanguage } from "./core/i18n.js";
import { Shell } from "./shell/shell.js";

await loadLanguage(document.documentElement.lang);
const root = /** @type {HTMLElement} */ (document.getElementById("app"));
root.replaceChildren();
render(html`<${Shell} />`, root);
