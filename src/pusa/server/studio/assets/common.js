// Share texts, elements, requests and one poll of the state among the parts of the page.
(() => {
  const texts = pusa.texts[pusa.language];

  /** Return the text of a key, with {name} replaced by values.name. */
  pusa.t = (key, values = {}) =>
    (texts[key] ?? pusa.texts.en[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");

  pusa.has = (key) => key in texts;

  /** Make an element: h("button.primary", {type: "button", onclick}, child, "text", null). Texts are never parsed as HTML. */
  pusa.h = (tag, attributes = {}, ...children) => {
    const [name, ...classes] = tag.split(".");
    const element = document.createElement(name);
    if (classes.length) element.className = classes.join(" ");
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (key === "style") element.style.cssText = value;
      else if (key in element && typeof value === "boolean") element[key] = value;
      else element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  };

  const SVG = "http://www.w3.org/2000/svg";
  /** Make a line icon of 20 x 20 pixels, hidden from screen readers. */
  pusa.icon = (name) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 20 20");
    svg.setAttribute("aria-hidden", "true");
    svg.classList.add("pusa-icon");
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  };
  const ICONS = {
    download: "M10 3v9m-4-3.5 4 4 4-4M4 16.5h12",
    frame: "M3 5h14v10H3zM13.5 5v10",
    extend: "M3 6h7v8H3zM13 10h5m-2-2.5 2.5 2.5L16 12.5",
    again: "M16 10a6 6 0 1 1-2-4.500M14.5 2v4h-4",
    dice: "M4 4h12v12H4zM7.5 7.500h.01M12.5 7.500h.01M10 10h.01M7.5 12.500h.01M12.5 12.500h.01",
    close: "M5 5l10 10M15 5 5 15",
    trash: "M4 6h12M8 6V4h4v2M5.5 6l.8 10h7.400l.8-10",
    sun: "M10 6.500a3.5 3.5 0 1 1 0 7 3.5 3.5 0 0 1 0-7zM10 2v1.500M10 16.500V18M2 10h1.500M16.5 10H18M4.300 4.300l1.100 1.100M14.600 14.600l1.100 1.100M4.300 15.700l1.100-1.100M14.600 5.400l1.100-1.100",
    moon: "M16 11.500A6.5 6.5 0 0 1 8.5 4a6.5 6.5 0 1 0 7.5 7.500z",
    play: "M7 4.500v11l9-5.500z",
    left: "M12 5l-5 5 5 5",
    right: "M8 5l5 5-5 5",
    copy: "M7 7h9v9H7zM4 13V4h9",
  };

  /** Fetch JSON from a route of the studio. Throws an Error with a message for the visitor; .offline if no server answers. */
  pusa.ask = async (path, options = {}) => {
    let answer;
    try {
      answer = await fetch(`studio/${path}`, { cache: "no-store", ...options });
    } catch {
      throw Object.assign(new Error(pusa.t("error.connection")), { offline: true });
    }
    const body = await answer.json().catch(() => null);
    if (answer.ok && body !== null) return body;
    const told = body?.error?.message || pusa.t(answer.status === 404 ? "error.gone" : "error.internal");
    throw Object.assign(new Error(told), { status: answer.status, offline: answer.status >= 502 });
  };
  pusa.post = (path) => pusa.ask(path, { method: "POST" });
  pusa.media = (job, variant, query = "") => `studio/media/${job.id}/${variant}?${job.attempt}${query}`;

  /** Format seconds: 95 -> "1 min 35 s". */
  pusa.time = (seconds) => {
    const s = Math.max(0, Math.round(seconds));
    const parts = [[Math.floor(s / 3600), "hours"], [Math.floor(s / 60) % 60, "minutes"], [s % 60, "seconds"]];
    const shown = parts.filter(([n]) => n > 0).slice(0, 2);
    return (shown.length ? shown : [[0, "seconds"]]).map(([n, unit]) => pusa.t(`time.${unit}`, { n })).join(" ");
  };

  pusa.ago = (unix) => {
    const minutes = Math.round((unix - Date.now() / 1000) / 60);
    const format = new Intl.RelativeTimeFormat(pusa.language, { numeric: "auto", style: "short" });
    if (Math.abs(minutes) < 60) return format.format(minutes, "minute");
    if (Math.abs(minutes) < 1440) return format.format(Math.round(minutes / 60), "hour");
    return format.format(Math.round(minutes / 1440), "day");
  };

  pusa.number = (value) => new Intl.NumberFormat(pusa.language, { maximumFractionDigits: 2 }).format(value);

  // ---- one poll ----

  const listeners = new Set();
  let followed = "", last = null, timer = 0, lost = 0, asked = 0, running = false;

  /** Call back with {model, job, offline} after every poll, and at once after an earlier one. */
  pusa.onState = (callback) => {
    listeners.add(callback);
    if (last) callback(last);
  };
  /** Poll a job by its id; "" for none. The page's address holds the id, so that a reload finds the job again. */
  pusa.follow = (id, push = true) => {
    if (id === followed) return poll();
    followed = id;
    const address = new URL(location.href);
    if (id) address.searchParams.set("job", id); else address.searchParams.delete("job");
    if (push) history.replaceState(history.state, "", address);
    if (last) tell({ ...last, job: null, following: id, unknown: true });
    return poll();
  };
  pusa.followed = () => followed;

  const tell = (state) => { last = state; for (const callback of listeners) callback(state); };

  async function poll() {
    clearTimeout(timer);
    const id = followed, mine = ++asked;
    running = true;
    let state;
    try {
      state = { ...(await pusa.ask(`state?job=${encodeURIComponent(id)}`)), following: id, offline: false };
      lost = 0;
    } catch (error) {
      lost += 1;
      state = { model: last?.model, job: last?.following === id ? last?.job : null, following: id, offline: true, error };
    }
    if (mine !== asked) return;
    running = false;
    if (!state.offline || lost > 1) tell(state);
    timer = setTimeout(poll, pause(state));
  }

  function pause(state) {
    if (document.hidden) return 4000;
    if (state.offline) return Math.min(5000, 700 * lost);
    const busy = state.job && (state.job.status === "queued" || state.job.status === "in_progress");
    if (busy) return state.job.seconds_left > 60 ? 1000 : 450;
    return state.model?.ready ? 10000 : 1000;
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden && !running) poll(); });
  document.addEventListener("DOMContentLoaded", () => {
    followed = new URLSearchParams(location.search).get("job") || "";
    poll();
  });

  // ---- Gradio's own elements ----

  /** Write into one of Gradio's text fields, with the event that typing raises. */
  pusa.type = (selector, text) => {
    const field = document.querySelector(`${selector} textarea, ${selector} input`);
    if (!field) return;
    const prototype = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(prototype.prototype, "value").set.call(field, text);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
})();
