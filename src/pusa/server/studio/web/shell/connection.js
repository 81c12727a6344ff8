/** Notice that the server answers again, and read anew what the page needs of it. */
import { get } from "../core/api.js";
import { effect } from "../core/dom.js";
import { connection, model, session } from "../core/store.js";
import { needsKey, readSession } from "./session.js";

const SECONDS = 2; // between two questions while the server is away

/**
 * Ask the server whether it is there; `connection` then tells. The model is asked for at the same time, unless it is
 * known that a key comes first: a new visitor's page is there sooner.
 */
export async function checkConnection() {
  await Promise.allSettled(needsKey() ? [readSession()] : [readSession(), readModel()]);
}

/** Read the model, with all that the form needs of it. */
export async function readModel() {
  const list = await get("/v1/models");
  model.value = list.data[0] ?? null;
}

/** Ask again and again while the server does not answer, or the page has not all that it needs of it. */
export function watchConnection() {
  let timer = 0;
  effect(() => {
    const isMissing = connection.value === "lost" || !session.value || (!needsKey() && !model.value);
    clearInterval(timer);
    if (isMissing) timer = window.setInterval(() => void checkConnection(), 1000 * SECONDS);
  });
  addEventListener("offline", () => void checkConnection());
  addEventListener("online", () => void checkConnection());
}
