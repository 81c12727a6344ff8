/** What can be done with the videos that are selected. */
import { html, useState } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { Icon } from "../shell/icon.js";
import { Toolbar } from "../shell/roving.js";
import { removeAll, save, setFavourite } from "../result/actions.js";
import { compare, show } from "../result/selection.js";
import { contentUrl } from "../result/words.js";
import { Film } from "./film.js";
import { choosing, chosen, chosenVideos } from "./state.js";

const BETWEEN_MS = 400; // a browser takes several downloads of one press only one after another

function clear() {
  chosen.value = new Set();
  choosing.value = false;
}

/** @param {any[]} list */
async function download(list) {
  for (const job of list) {
    save(contentUrl(job));
    await new Promise((resolve) => setTimeout(resolve, BETWEEN_MS));
  }
}

/** @param {{name: string, icon: string, onClick: () => void, filled?: boolean}} props */
const Act = ({ name, icon, onClick, filled }) => html`<button type="button" class="button" aria-label=${name} title=${name} onClick=${onClick}>
  <${Icon} name=${icon} size=${18} filled=${filled} /><span>${name}</span>
</button>`;

export function Chosen() {
  const [film, setFilm] = useState(/** @type {any[]|null} */ (null));
  const list = chosenVideos.value;
  const areFavourites = list.every((job) => job.favourite);
  const deleteAll = () => {
    clear();
    void removeAll(list);
  };
  return html`
    ${list.length > 0 &&
    html`<div class="chosen" role="region" aria-label=${t("gallery.selected_label")}>
      <strong class="number" role="status">${t("gallery.selected", { count: list.length })}</strong>
      <${Toolbar} label=${t("gallery.selected_label")} class="chosen-actions">
        <${Act} name=${t(areFavourites ? "result.unfavourite" : "result.favourite")} icon="star" filled=${areFavourites} onClick=${() => setFavourite(list, !areFavourites)} />
        ${list.length === 2 && html`<${Act} name=${t("result.compare")} icon="compare" onClick=${() => (compare(list[0].id, list[1].id), clear())} />`}
        ${list.length > 1 && list.length <= 8 && html`<${Act} name=${t("gallery.beside")} icon="grid" onClick=${() => (show(list.map((job) => job.id)), clear())} />`}
        ${list.length > 1 && html`<${Act} name=${t("gallery.film.make")} icon="film" onClick=${() => setFilm([...list].reverse())} />`}
        <${Act} name=${t("result.download.label")} icon="download" onClick=${() => download(list)} />
        <${Act} name=${t("result.delete")} icon="trash" onClick=${deleteAll} />
      <//>
      <button type="button" class="button plain icon" aria-label=${t("gallery.clear")} title=${t("gallery.clear")} onClick=${clear}>
        <${Icon} name="close" />
      </button>
    </div>`}
    ${film && html`<${Film} list=${film} onClose=${() => setFilm(null)} />`}
  `;
}
