/** Pictures, clips and cards of the gallery that are put on the timeline. */
import { post, upload } from "../core/api.js";
import { batch } from "../core/dom.js";
import { itemOf } from "../core/from_body.js";
import { t, told } from "../core/i18n.js";
import { edit, form, jobs, model, newId } from "../core/store.js";
import { ANY_PICTURE, ours } from "../form/files.js";
import { toast } from "../shell/toasts.js";
import { addPicture } from "./edits.js";
import { openFrames } from "./frames.js";
import { kindOf } from "./model.js";
import { cellAt } from "./scale.js";
import { arriving, cell, chosen, dropCell, layout } from "./state.js";
import { focusCard } from "./keys.js";

/** @typedef {import("../core/store.js").Item} Item */

/** The kind of data that a card of the gallery carries: the id of its video. */
const VIDEO_TYPE = "application/x-pusa-video";

/**
 * Keep a result as a file of one's own, so that it stays when the result is deleted.
 * @param {string} id of a video
 */
export async function itemOfVideo(id) {
  const item = itemOf(await post("/v1/files", { video_id: id }), null, newId());
  return { ...item, name: jobs.value.get(id)?.prompt?.slice(0, 60) || item.name };
}

/** @param {DataTransfer|null} transfer */
const canDrop = (transfer) =>
  Boolean(transfer && [...transfer.types].some((type) => type === "Files" || type === VIDEO_TYPE));

/** The latent frame under a pointer, if it is over the track. @param {{clientX: number}} event */
function cellUnder(event) {
  const track = document.querySelector("[data-track]");
  if (!track || !layout.value) return null;
  return cellAt(event.clientX - track.getBoundingClientRect().left, cell.value, layout.value.length.count);
}

/** @param {DragEvent} event */
export function onDragOver(event) {
  if (!canDrop(event.dataTransfer)) return;
  event.preventDefault();
  event.stopPropagation();
  /** @type {DataTransfer} */ (event.dataTransfer).dropEffect = "copy";
  dropCell.value = cellUnder(event);
}

/** @param {DragEvent} event */
export function onDragLeave(event) {
  const inside = /** @type {HTMLElement} */ (event.currentTarget).contains(
    /** @type {Node|null} */ (event.relatedTarget),
  );
  if (!inside) dropCell.value = null;
}

/** @param {DragEvent} event */
export async function onDrop(event) {
  const transfer = event.dataTransfer;
  if (!transfer || !canDrop(transfer)) return;
  event.preventDefault();
  event.stopPropagation();
  const at = cellUnder(event);
  dropCell.value = null;
  const video = transfer.getData(VIDEO_TYPE);
  if (video) await bring(() => itemOfVideo(video), (item) => place(item, at), t("timeline.result"), null, at);
  else await addFiles([...transfer.files], at);
}

/** Ask for files. @param {number|null} at latent frame; null: placed automatically */
export function chooseFiles(at) {
  const input = document.createElement("input");
  input.type = "file";
  input.multiple = true;
  input.accept = ANY_PICTURE;
  input.onchange = () => addFiles([...(input.files ?? [])], at);
  input.click();
}

/** Send files to the server; each goes to its place as it arrives. @param {File[]} files @param {number|null} at */
export async function addFiles(files, at) {
  for (const [number, file] of files.entries()) {
    const preview = file.type.startsWith("image/") ? URL.createObjectURL(file) : null;
    const where = number === 0 ? at : null;
    const put = (/** @type {any} */ sent) => putFile(sent, where, files.length === 1);
    await bring(() => upload(file), put, file.name, preview, where);
    if (preview) URL.revokeObjectURL(preview);
  }
}

/** Place what was sent; of a file that pusa made the visitor is asked first. @param {any} file @param {number|null} at @param {boolean} isAlone */
function putFile(file, at, isAlone) {
  const item = itemOf(file, null, newId());
  if (isAlone && file.has_request) ours.value = { item, use: () => place(item, at) };
  else place(item, at);
}

/**
 * @template T
 * @param {() => Promise<T>} get @param {(found: T) => void} put @param {string} name @param {string|null} preview
 * @param {number|null} at
 */
async function bring(get, put, name, preview, at) {
  const id = newId();
  arriving.value = [...arriving.value, { id, cell: at, name, preview }];
  try {
    put(await get());
  } catch (error) {
    toast(told("errors", /** @type {any} */ (error)), { kind: "problem" });
  } finally {
    arriving.value = arriving.value.filter((one) => one.id !== id);
  }
}

/** Put an item where its tab wants it. @param {Item} item @param {number|null} at latent frame */
export function place(item, at) {
  const kind = kindOf(form.value);
  if (["complete", "extend", "transition"].includes(kind)) {
    if (item.kind === "video") placeClip(item, at);
    else toast(t("timeline.wants_clip"), { kind: "problem" });
    return;
  }
  if (item.kind === "video") {
    openFrames(item, 0, (frame) => put({ ...item, frame }, at));
    return;
  }
  put(item, at);
}

/** @param {Item} item @param {number|null} at */
function put(item, at) {
  batch(() => {
    edit((now) => addPicture(now, model.value, item, at));
    chosen.value = item.id;
  });
  focusCard(item.id);
}

/** @param {Item} clip @param {number|null} at  its half of a transition tells which clip it is */
function placeClip(clip, at) {
  const clips = [...form.value.clips];
  const isSecond =
    form.value.mode === "transition" &&
    clips.length > 0 &&
    (at === null ? clips.length === 1 : at >= (layout.value?.length.count ?? 0) / 2);
  clips[isSecond ? 1 : 0] = clip;
  edit({ clips });
}
