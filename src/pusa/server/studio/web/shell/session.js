/** The visitor's session: whether a key is needed, is there, and how it ends. */
import { get, post, remove } from "../core/api.js";
import { jobs, previews, selected, session } from "../core/store.js";

/** Ask the server. @returns {Promise<void>} */
export async function readSession() {
  session.value = await get("/v1/session");
}

/** Whether the page has to ask for a key first. */
export const needsKey = () => Boolean(session.value?.keys_required && !session.value?.signed_in);

/** @param {string} key @returns {Promise<void>} fails with an ApiError for a key that is not known */
export async function signIn(key) {
  await post("/v1/session", { key });
  await readSession();
}

/** End the session here; the form stays in the browser. */
export async function signOut() {
  await remove("/v1/session");
  jobs.value = new Map();
  previews.value = new Map();
  selected.value = [];
  session.value = { ...session.value, signed_in: false };
}
