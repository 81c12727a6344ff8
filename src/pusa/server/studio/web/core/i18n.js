/**
 * Texts in the visitor's language: locales/LANGUAGE.json, nested by section, in ICU MessageFormat.
 *
 * A further language is one more file; the server lists the files it has.
 */
import IntlMessageFormat from "intl-messageformat";
import { signal } from "./dom.js";
import { setPrefs } from "./store.js";

/** @type {import("./dom.js").Signal<{language: string, texts: Record<string, any>}>} */
const loaded = signal({ language: "en", texts: {} });
/** @type {Map<string, IntlMessageFormat>} */
const compiled = new Map();

/** The language that is shown; parts that use `t` are drawn again when it changes. */
export const language = () => loaded.value.language;

/** What stands before the decimals of a number: a comma in French. */
export const decimalMark = () => new Intl.NumberFormat(language()).format(1.5).charAt(1);

/** @param {string} name */
export async function loadLanguage(name) {
  const response = await fetch(new URL(`../locales/${name}.json`, import.meta.url));
  if (!response.ok) throw new Error(`no texts for ${name}: ${response.status}`);
  const texts = await response.json();
  compiled.clear();
  document.documentElement.lang = name;
  loaded.value = { language: name, texts };
}

/** Change the language for good. @param {string} name */
export async function setLanguage(name) {
  setPrefs({ language: name });
  try {
    await loadLanguage(name);
  } catch {
    location.reload(); // the server has a newer page: the form is stored
  }
}

/** @param {string} key @returns {string|undefined} */
function find(key) {
  let found = loaded.value.texts;
  for (const part of key.split(".")) found = found?.[part];
  return typeof found === "string" ? found : undefined;
}

/** Tell whether there is a text. @param {string} key */
export const has = (key) => find(key) !== undefined;

/**
 * The text of a key such as "form.prompt.label", with its values filled in; the key itself where there is none.
 * @param {string} key @param {Record<string, any>} [values]
 * @returns {string}
 */
export function t(key, values) {
  const pattern = find(key);
  if (pattern === undefined) return key;
  if (!values && !pattern.includes("{") && !pattern.includes("'")) return pattern;
  let format = compiled.get(key);
  if (!format) compiled.set(key, (format = new IntlMessageFormat(pattern, loaded.value.language)));
  return String(format.format(values));
}

/**
 * The text of an error or a note of the API, by its code; the API's own English text where the page has none.
 * @param {"errors"|"notes"} section @param {{code?: string|null, values?: Record<string, any>|null, message?: string}} told
 */
export function told(section, { code, values, message }) {
  const key = `${section}.${code}`;
  if (!code || !has(key)) return message || t("errors.internal_error");
  const field = section === "errors" && values?.field && `errors.fields.${values.field}`;
  const format = values?.format && `errors.formats.${String(values.format).toLowerCase().replace(/\W+/g, "_").replace(/_$/, "")}`;
  const known = { ...(field && has(field) ? { field: t(field) } : {}), ...(format && has(format) ? { format: t(format) } : {}) };
  try {
    return t(key, { ...values, ...known, message });
  } catch {
    return message || t(key); // a value is missing: a server of another version
  }
}
