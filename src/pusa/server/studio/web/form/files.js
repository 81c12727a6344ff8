/** Pictures and clips that come to the form: sent to the durable store, and put where the open tab has room for them. */
import { ApiError, post, upload } from "../core/api.js";
import { signal } from "../core/dom.js";
import { itemOf } from "../core/from_body.js";
import { t, told } from "../core/i18n.js";
import { edit, form, newId, problem } from "../core/store.js";
import { toast } from "../shell/toasts.js";
import { placed, takesClips } from "./placed.js";

/** @typedef {import("../core/store.js").Item} Item */

/** What a file chooser offers: all that the server's prober may read. */
export const ANY_PICTURE = "image/*,video/*,.heic,.heif,.avif,.gif,.webp,.mov,.mkv,.avi,.mp4,.webm";

/** A file that pusa made, with all of its settings inside, which the visitor is asked about. */
export const ours = signal(/** @type {{item: Item, use: () => void}|null} */ (null));

/** @param {DataTransfer|null} transfer @returns {(File|{video_id: string})[]} files, or a card of the gallery */
export function filesOf(transfer) {
  const card = transfer?.getData("application/x-pusa-video");
  return card ? [{ video_id: card }] : [...(transfer?.files ?? [])];
}

/** @param {unknown} error @returns {void} */
function tell(error) {
  if (!(error instanceof ApiError)) throw error;
  problem.value = error;
  toast(told("errors", error), { kind: "problem" });
}

/** @param {File|{video_id: string}} file @returns {Promise<any>} its FileObject; null where it failed */
async function sent(file) {
  try {
    return await (file instanceof Blob ? upload(file) : post("/v1/files", file));
  } catch (error) {
    tell(error);
    return null;
  }
}

/**
 * Send files, and put those that arrive into the form.
 * @param {(File|{video_id: string})[]} files
 * @param {number|null} [index]  of the item to replace
 * @returns {Promise<void>}
 */
export async function addFiles(files, index = null) {
  const found = (await Promise.all(files.map(sent))).filter(Boolean);
  const fitting = found.filter((file) => !takesClips(form.value) || file.kind === "video");
  for (const file of found.filter((one) => !fitting.includes(one))) {
    toast(t("form.inputs.not_video", { name: file.filename }), { kind: "problem" });
  }
  if (!fitting.length) return;
  const items = fitting.map((file) => {
    const item = itemOf(file, null, newId());
    return item.kind === "video" && !takesClips(form.value) ? { ...item, frame: 0 } : item;
  });
  if (items.length === 1 && fitting[0].has_request) ours.value = { item: items[0], use: () => place(items, index) };
  else place(items, index);
}

/** @param {Item[]} items @param {number|null} index */
export const place = (items, index) => edit((now) => placed(now, items, index));

/**
 * Send files that are there by their addresses.
 * @param {string[]} addresses
 * @returns {Promise<any[]>} their FileObjects
 */
export const sendFrom = (addresses) =>
  Promise.all(
    addresses.map(async (address) => {
      const response = await fetch(address);
      const name = new URL(address, document.baseURI).pathname.split("/").at(-1) ?? "file";
      return upload(await response.blob(), name);
    }),
  );
