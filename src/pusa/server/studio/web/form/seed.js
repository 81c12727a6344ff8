/** The seed, exact to the last digit, and its lock. */
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { MOST_SEED, readSeed, seedAfter } from "../core/seeds.js";
import { edit, form } from "../core/store.js";
import { drawSeed } from "../core/token.js";
import { Field } from "../shell/field.js";
import { Icon } from "../shell/icon.js";

export function Seed() {
  const { seed, seedLocked } = form.value;
  const [typed, setTyped] = useState(/** @type {string|null} */ (null)); // null: nobody types
  const [problem, setProblem] = useState(/** @type {string|null} */ (null));
  const set = (/** @type {import("../core/seeds.js").Seed|null} */ value) => edit({ seed: value, seedLocked: value !== null }, "seed");
  const toggle = () => edit({ seedLocked: !seedLocked, seed: seed ?? drawSeed() });
  const onInput = (/** @type {any} */ event) => {
    const text = event.currentTarget.value;
    setTyped(text);
    setProblem(null);
    if (!text.trim()) return set(null);
    const found = readSeed(text);
    if (!found) return setProblem(t("fields.not_whole"));
    if (found.isTooLarge) setProblem(t("fields.range", { min: 0, max: MOST_SEED }));
    set(found.seed);
  };
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setTyped(null);
    setProblem(null);
    set(seed === null || (seed === 0 && by < 0) ? 0 : seedAfter(seed, by));
  };
  const shown = typed ?? String(seed ?? "");
  const lock = t(seedLocked ? "form.row.unlock" : "form.row.lock");
  return html`<${Field} id="seed" label=${t("form.row.seed")} problem=${problem} class=${`seed ${seedLocked ? "" : "free"}`}>
    <div class="number-box">
      <input
        id="seed"
        class="number"
        type="text"
        inputmode="numeric"
        autocomplete="off"
        value=${shown}
        title=${shown}
        placeholder=${t("form.row.random")}
        aria-describedby=${problem ? "seed-problem" : undefined}
        onInput=${onInput}
        onKeyDown=${onKeyDown}
        onBlur=${() => (setTyped(null), setProblem(null))}
      />
      <button type="button" class="button plain icon lock" aria-pressed=${String(seedLocked)} aria-label=${t("form.row.lock")} title=${lock} onClick=${toggle}>
        <${Icon} name=${seedLocked ? "lock" : "unlock"} size=${18} />
      </button>
    </div>
  <//>`;
}
