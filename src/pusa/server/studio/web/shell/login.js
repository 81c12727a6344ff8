/** The page of a server with API keys, before one is given. */
import { html, useState } from "../core/dom.js";
import { t, told } from "../core/i18n.js";
import { readModel } from "./connection.js";
import { TextField } from "./field.js";
import { Mark } from "./header.js";
import { signIn } from "./session.js";

export function Login() {
  const [key, setKey] = useState("");
  const [problem, setProblem] = useState(/** @type {string|null} */ (null));
  const [busy, setBusy] = useState(false);
  const onSubmit = async (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!key.trim()) return setProblem(t("shell.login.empty"));
    setBusy(true);
    try {
      await signIn(key.trim());
      await readModel();
    } catch (error) {
      const { status } = /** @type {any} */ (error);
      setProblem(status === 401 ? t("shell.login.wrong") : told("errors", /** @type {any} */ (error)));
    } finally {
      setBusy(false);
    }
  };
  return html`<main class="login">
    <form class="card login-card" onSubmit=${onSubmit}>
      <h1 class="brand"><${Mark} />pusa <span class="quiet">${t("shell.tagline")}</span></h1>
      <p>${t("shell.login.text")}</p>
      <${TextField} label=${t("shell.login.key")} value=${key} id="key" type="password" onChange=${(/** @type {any} */ text) => (setKey(text), setProblem(null))} problem=${problem} />
      <button class="button primary" disabled=${busy}>${t("shell.login.submit")}</button>
    </form>
  </main>`;
}
