/** The keyboard on the timeline. */
import { form, model } from "../core/store.js";
import { movePicture, nextFree, removeItem, roundNoise, changeItem, setKeptNoise } from "./edits.js";
import { toggle } from "./kept.js";
import { openCrop } from "./crop.js";
import { apply, chosen, layout, ordered } from "./state.js";

const NOISE = /** @type {Record<string, number>} */ ({ ArrowUp: 0.05, ArrowDown: -0.05, PageUp: 0.2, PageDown: -0.2 });

/** Put the focus on a picture or a latent frame, when it has been drawn. @param {string} selector */
function focus(selector) {
  requestAnimationFrame(() => {
    const found = /** @type {HTMLElement|null} */ (document.querySelector(`[data-track] ${selector}`));
    found?.focus({ preventScroll: true });
    found?.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

/** @param {string} id of a picture's item */
export const focusCard = (id) => focus(`[data-item="${CSS.escape(id)}"]`);

/** @param {KeyboardEvent} event */
const isOther = (event) => event.ctrlKey || event.metaKey || event.altKey;

/** @param {KeyboardEvent} event @param {import("./model.js").Placed} one */
export function onCardKey(event, one) {
  if (isOther(event)) return;
  const list = ordered.value;
  const index = list.indexOf(one);
  const id = one.item.id;
  const go = (/** @type {number} */ to) => list[to] && focusCard(list[to].item.id);
  const move = (/** @type {1|-1} */ direction) => {
    const cell = nextFree(form.value, model.value, id, direction);
    if (cell !== null) apply(movePicture(form.value, model.value, id, cell), `move:${id}`);
    focusCard(id);
  };
  /** @type {Record<string, () => void>} */
  const actions = {
    ArrowLeft: () => (event.shiftKey ? move(-1) : go(index - 1)),
    ArrowRight: () => (event.shiftKey ? move(1) : go(index + 1)),
    Home: () => go(0),
    End: () => go(list.length - 1),
    Delete: () => removeCard(id),
    Backspace: () => removeCard(id),
    Enter: () => openCrop(one.item),
  };
  if (NOISE[event.key]) {
    apply(changeItem(form.value, id, { noise: roundNoise(one.noise + NOISE[event.key]) }), `noise:${id}`);
  } else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

/** Remove a picture; the focus goes to its neighbour. @param {string} id */
export function removeCard(id) {
  const list = ordered.value;
  const index = list.findIndex((one) => one.item.id === id);
  const next = list[index + 1] ?? list[index - 1];
  apply(removeItem(form.value, id), "");
  chosen.value = next?.item.id ?? "";
  if (next) focusCard(next.item.id);
}

/** @param {KeyboardEvent} event @param {number} at latent frame */
export function onKeptKey(event, at) {
  const shown = layout.value;
  if (isOther(event) || !shown) return;
  const one = shown.kept.find((other) => other.cell === at);
  const go = (/** @type {number} */ to) => {
    const cell = Math.min(shown.length.count - 1, Math.max(0, to));
    chosen.value = `cell:${cell}`;
    focus(`.kept-cell[data-cell="${cell}"]`);
  };
  /** @type {Record<string, () => void>} */
  const actions = {
    ArrowLeft: () => go(at - 1),
    ArrowRight: () => go(at + 1),
    Home: () => go(0),
    End: () => go(shown.length.count - 1),
    Enter: () => toggle(at),
    " ": () => toggle(at),
    Delete: () => one && toggle(at),
  };
  if (NOISE[event.key]) {
    if (one) apply(setKeptNoise(form.value, model.value, at, one.noise + NOISE[event.key]), `kept:${at}`);
  } else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}
