/** Videos that exist go back into the form: all of one's settings, a frame, or the clip to go on from. */
import { get, post } from "./api.js";
import { t } from "./i18n.js";
import { fromBody, itemOf, referenceKey, referencesOf } from "./from_body.js";
import { edit, emptyForm, model, newId, undo } from "./store.js";
import { toast } from "../shell/toasts.js";

/** @typedef {import("./store.js").Item} Item */

/**
 * The file on the server of what a reference names, without its cuts; null if it is not there any more.
 * @param {any} reference @returns {Promise<any>} a FileObject
 */
async function fileOf(reference) {
  const { file_id, video_id, input, id } = typeof reference === "string" ? { file_id: reference } : reference;
  try {
    if (file_id) return await get(`/v1/files/${file_id}`);
    return await post("/v1/files", { video_id: video_id ?? id, ...(input === undefined ? {} : { input }) });
  } catch (error) {
    const { status } = /** @type {any} */ (error);
    if (status === 404 || status === 410) return null;
    throw error;
  }
}

/**
 * Take all settings of a request into the form.
 * @param {any} body  of POST /v1/videos
 * @returns {Promise<void>}
 */
async function editFrom(body) {
  const references = referencesOf(body);
  const found = await Promise.all(references.map(fileOf));
  const files = new Map(references.flatMap((one, index) => (found[index] ? [[referenceKey(one), found[index]]] : [])));
  const { form, lost } = fromBody(body, files, model.value, emptyForm(), newId);
  edit(form, "");
  toast(t("form.taken_over"), { action: undo, label: t("form.undo") });
  if (lost) toast(t("form.problem.lost_inputs", { count: lost }), { kind: "problem", seconds: 12 });
  showForm();
}

/** Edit a video: all of it is in the form again. @param {string} id @returns {Promise<void>} */
export const editVideo = async (id) => editFrom((await get(`/v1/videos/${id}/request`)).request);

/** Edit what one of our own files holds. @param {string} id  of the file @returns {Promise<void>} */
export const editFile = async (id) => editFrom((await get(`/v1/files/${id}/request`)).request);

/** @param {string} videoId @returns {Promise<Item>} */
async function itemOfVideo(videoId) {
  return itemOf(await post("/v1/files", { video_id: videoId }), null, newId());
}

/**
 * Take a frame of a video as the picture of the form.
 * @param {string} videoId @param {number|null} [frame]  null: the last one
 * @returns {Promise<void>}
 */
export async function useFrame(videoId, frame = null) {
  const [item, video] = await Promise.all([itemOfVideo(videoId), get(`/v1/videos/${videoId}`)]);
  const last = Math.max(0, (item.frames ?? 1) - 1);
  const still = { ...item, frame: frame === null ? last : Math.min(last, Math.max(0, frame)) };
  edit((now) => ({
    tab: now.tab === "images" ? "images" : "image",
    items: now.tab === "images" ? [...now.items, still] : [still],
    prompt: now.prompt.trim() ? now.prompt : (video.prompt ?? ""),
  }));
  showForm();
}

/** Go on where a video ends. @param {string} id @returns {Promise<void>} */
export async function extendVideo(id) {
  const [item, video] = await Promise.all([itemOfVideo(id), get(`/v1/videos/${id}`)]);
  edit({ tab: "video", mode: "extend", clips: [item], prompt: video.prompt ?? "" });
  showForm();
}

/** Bring the form into view, and the cursor to the prompt, where that needs no keyboard on the screen. */
function showForm() {
  const prompt = document.getElementById("prompt");
  prompt?.scrollIntoView({ block: "center", behavior: "smooth" });
  if (matchMedia("(pointer: fine)").matches) prompt?.focus({ preventScroll: true });
}
