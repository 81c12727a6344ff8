/** The page's entry: texts first, then the shell, then what the server tells. */
import { html, render } from "./core/dom.js";
import { loadLanguage } from "./core/i18n.js";
import { checkConnection, watchConnection } from "./shell/connection.js";
import { Shell } from "./shell/shell.js";

const asking = checkConnection();
await loadLanguage(document.documentElement.lang);
const root = /** @type {HTMLElement} */ (document.getElementById("app"));
root.replaceChildren();
render(html`<${Shell} />`, root);
await asking;
watchConnection();
