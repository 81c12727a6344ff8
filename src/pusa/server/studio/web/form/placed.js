/** Where pictures and clips go that come to the form. Pure. */

/** @typedef {import("../core/store.js").Form} Form */
/** @typedef {import("../core/store.js").Item} Item */

/** @param {Form} now @returns {boolean} whether the open tab takes clips */
export const takesClips = (now) => now.tab === "video" && now.mode !== "loop";

/**
 * Put items where the open tab has room.
 * @param {Form} now @param {Item[]} added @param {number|null} index  of the one to replace; null: none
 * @returns {Partial<Form>}
 */
export function placed(now, added, index) {
  const name = takesClips(now) ? "clips" : "items";
  const list = [...now[name]];
  if (index !== null && list[index]) {
    const { position, noise } = list[index];
    list[index] = { ...added[0], position, noise };
    return { [name]: list };
  }
  if (now.tab === "images") return { items: [...list, ...added] };
  if (name === "clips") {
    const room = now.mode === "transition" ? 2 : 1;
    if (index !== null) return { clips: [...list, ...added].slice(0, room) };
    const kept = list.length + added.length > room ? list.slice(0, Math.max(0, room - added.length)) : list;
    return { clips: [...kept, ...added].slice(0, room) };
  }
  const tab = now.tab === "text" ? "image" : now.tab;
  if (added.length > 1 && tab === "image") return { tab: "images", items: added };
  return { tab, items: [added[0], ...list.slice(1)] };
}

