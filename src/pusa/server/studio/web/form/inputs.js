/** Pictures and clips of the open tab as cards, and the place where further ones are dropped. */
import { html, useId, useRef } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { aspectOf, targetSize } from "../core/size.js";
import { edit, form, model, uploads } from "../core/store.js";
import { Icon } from "../shell/icon.js";
import { Toolbar } from "../shell/roving.js";
import { stillUrl } from "../timeline/pictures.js";
import { ANY_PICTURE, addFiles } from "./files.js";
import { takesClips } from "./placed.js";
import { numberText } from "./units.js";

/** @typedef {import("../core/store.js").Item} Item */

const VISIBLE_CUT = 0.02; // of the aspect ratio

/** @returns {{list: Item[], room: number}} what is shown, and how many there may be */
function slots() {
  const now = form.value;
  if (takesClips(now)) return { list: now.clips.slice(0, now.mode === "transition" ? 2 : 1), room: now.mode === "transition" ? 2 : 1 };
  if (now.tab === "images") return { list: now.items, room: 64 };
  return { list: now.items.slice(0, 1), room: 1 };
}

/** @param {number} index @returns {string} what stands there */
function slotName(index) {
  const now = form.value;
  if (now.tab === "images") return t("form.inputs.images");
  if (now.tab === "image") return t("form.inputs.image");
  if (now.mode === "loop") return t("form.inputs.loop");
  if (now.mode !== "transition") return t("form.inputs.video");
  return t(index === 0 ? "form.inputs.first" : "form.inputs.second");
}

/** @param {string} id */
const removeItem = (id) =>
  edit((now) => ({ items: now.items.filter((one) => one.id !== id), clips: now.clips.filter((one) => one.id !== id) }));

/** @param {Item} item */
async function crop(item) {
  const { openCrop } = await import("../timeline/crop.js");
  openCrop(item);
}

/** A chooser of files behind a button. @param {{many?: boolean, index?: number|null}} props */
function useChooser({ many = false, index = null }) {
  const ref = useRef(/** @type {HTMLInputElement|null} */ (null));
  const onChange = (/** @type {any} */ event) => {
    const files = [...event.currentTarget.files];
    event.currentTarget.value = ""; // the same file may be chosen again
    if (files.length) void addFiles(files, index);
  };
  const input = html`<input type="file" hidden tabindex="-1" ref=${ref} accept=${ANY_PICTURE} multiple=${many} onChange=${onChange} />`;
  return { input, open: () => ref.current?.click() };
}

/** @param {Item} item @returns {string} size and length */
function facts(item) {
  const size = `${item.width} × ${item.height}`;
  if (item.frame !== null) return `${size} · ${t("form.inputs.frame", { frame: item.frame })}`;
  return item.seconds && item.kind === "video" ? `${size} · ${t("form.inputs.seconds", { seconds: numberText(item.seconds, 1) })}` : size;
}

/** @param {Item} item @returns {string|null} what is lost of it without anybody having said so */
function cutNote(item) {
  if (!model.value || form.value.fit !== "crop" || item.crop) return null;
  const { width, height } = targetSize(form.value, model.value);
  if (!(Math.abs(Math.log(aspectOf(item) / (width / height))) > VISIBLE_CUT)) return null;
  return t("form.inputs.will_crop", { width: item.width, height: item.height, size: `${width} × ${height}` });
}

/** @param {{item: Item, index: number}} props */
function Card({ item, index }) {
  const { input, open } = useChooser({ index });
  const note = cutNote(item);
  return html`<li class="item-card" data-item=${item.id}>
    <img src=${stillUrl(item, 240)} alt=${item.name} width=${item.width} height=${item.height} loading="lazy" />
    <span class="item-facts" title=${item.name}>${facts(item)}</span>
    ${(note || item.crop) && html`<span class="item-badge" title=${note}><${Icon} name="crop" size=${12} /><span class="visually-hidden">${note ?? t("form.inputs.cropped")}</span></span>`}
    <${Toolbar} label=${t("form.inputs.tools", { name: item.name })} class="item-tools">
      <button type="button" class="button plain icon" aria-label=${t("form.inputs.crop")} title=${t("form.inputs.crop")} onClick=${() => crop(item)}><${Icon} name="crop" size=${18} /></button>
      <button type="button" class="button plain icon" aria-label=${t("form.inputs.replace")} title=${t("form.inputs.replace")} onClick=${open}><${Icon} name="replace" size=${18} /></button>
      <button type="button" class="button plain icon" aria-label=${t("form.inputs.remove")} title=${t("form.inputs.remove")} onClick=${() => removeItem(item.id)}><${Icon} name="close" size=${18} /></button>
    <//>
    ${input}
  </li>`;
}

/** Where the next one goes. @param {{index: number, alone: boolean}} props */
function Place({ index, alone }) {
  const many = form.value.tab === "images";
  const { input, open } = useChooser({ many, index: takesClips(form.value) ? index : null });
  const id = useId();
  const text = takesClips(form.value) ? "choose_video" : many ? "choose_many" : "choose";
  return html`<li class="item-place">
    <button type="button" class="drop" id=${many ? "choose" : `choose-${index}`} onClick=${open} aria-describedby=${id} aria-label=${alone || takesClips(form.value) ? undefined : t("form.inputs.add")}>
      <${Icon} name=${alone ? (takesClips(form.value) ? "video" : many ? "images" : "image") : "plus"} size=${alone ? 26 : 20} />
      <span>${alone || takesClips(form.value) ? t(`form.inputs.${text}`) : t("form.inputs.add")}</span>
      <span class="visually-hidden" id=${id}>${slotName(index)}</span>
    </button>
    ${input}
  </li>`;
}

function Arriving() {
  return uploads.value.map(
    (one) => html`<li class="item-arriving" key=${one.id}>
      <progress value=${one.sent} max=${one.total || 1} aria-label=${one.name}></progress>
      <span class="small">${t("form.inputs.uploading", { name: one.name, percent: Math.round((100 * one.sent) / (one.total || 1)) })}</span>
    </li>`,
  );
}

export function Inputs() {
  if (form.value.tab === "text") return null;
  const { list, room } = slots();
  const places = takesClips(form.value) ? room - list.length : list.length < room ? 1 : 0;
  const label = form.value.tab === "video" && form.value.mode === "transition" ? t("form.inputs.video") : slotName(0);
  return html`<div class="inputs">
    <span class="label" id="inputs-label">${label}</span>
    <ul class="items" aria-labelledby="inputs-label">
      ${list.map((item, index) => html`<${Card} key=${item.id} item=${item} index=${index} />`)}
      <${Arriving} />
      ${Array.from({ length: places }, (_, number) => html`<${Place} key=${`place-${number}`} index=${list.length + number} alone=${!list.length} />`)}
    </ul>
  </div>`;
}
