/** Prompts that were used, and settings that the visitor saved: in this browser only. */
import { signal } from "./dom.js";
import { read, write } from "./persist.js";

/** @typedef {import("./store.js").Form} Form */
/** @typedef {{name: string, values: Partial<Form>}} Saved */

const HISTORY_KEY = "pusa.prompts";
const SAVED_KEY = "pusa.settings";
const MOST_PROMPTS = 50;

/** @type {import("./dom.js").Signal<string[]>} newest first */
export const promptHistory = signal(read(HISTORY_KEY, /** @type {string[]} */ ([])));

/** @type {import("./dom.js").Signal<Saved[]>} by name */
export const savedSettings = signal(read(SAVED_KEY, /** @type {Saved[]} */ ([])));

/** @param {string} prompt */
export function remember(prompt) {
  const text = prompt.trim();
  if (!text) return;
  promptHistory.value = [text, ...promptHistory.value.filter((one) => one !== text)].slice(0, MOST_PROMPTS);
  write(HISTORY_KEY, promptHistory.value);
}

export function forgetPrompts() {
  promptHistory.value = [];
  write(HISTORY_KEY, null);
}

/**
 * Save all settings but the pictures, and what is written.
 * @param {string} name @param {Form} form
 */
export function saveSettings(name, form) {
  const { items, clips, prompt, seed, seedLocked, ...values } = form;
  const others = savedSettings.value.filter((one) => one.name !== name);
  const kept = seedLocked ? { ...values, seed, seedLocked } : values;
  savedSettings.value = [...others, { name, values: kept }].sort((a, b) => a.name.localeCompare(b.name));
  write(SAVED_KEY, savedSettings.value);
}

/** @param {string} name */
export function removeSettings(name) {
  savedSettings.value = savedSettings.value.filter((one) => one.name !== name);
  write(SAVED_KEY, savedSettings.value);
}
