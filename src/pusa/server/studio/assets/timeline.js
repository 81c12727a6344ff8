// Draw and edit the timeline: latent frames as cells, their conditions and noise. See pusa.server.studio.timeline.
(() => {
  const { h, t } = pusa;
  const STEP = 0.05, DRAG_PIXELS = 5, MIN_LABEL_PIXELS = 38, SETTLE_MS = 80, EDIT_MS = 500;
  const round = (noise) => Math.round(Math.min(1, Math.max(0, noise)) * 100) / 100;


  pusa.timeline = (element, props, watch, tell) => {
    const root = element.firstElementChild;
    let value = null, focused = 0, selected = 0, drag = null, timer = 0, editedAt = -EDIT_MS, asked = 0, waiting = 0;
    const summary = h("span.pusa-note");
    const strip = h("div.tl-strip", { role: "group" });
    const ruler = h("div.tl-ruler", { "aria-hidden": "true" });
    const readout = h("div.tl-readout");
    const spoken = h("div.pusa-hidden", { "aria-live": "polite" });
    const problem = h("p.tl-problem", { role: "status" });
    const help = h("p.pusa-note");
    root.replaceChildren(
      h("div.tl-title", {}, h("h2.pusa-label", {}, t("timeline.title")), summary),
      h("div.tl-scroll", {}, strip, ruler), problem, readout, help, spoken,
    );

    // ---- marks and cells ----

    /** Return the first and last frame of a cell: a VAE makes one latent frame of the first frame, and one of every few after it. */
    const framesOf = (cell) => {
      const last = value.frames_per_latent * cell;
      return [cell === 0 ? 0 : last - value.frames_per_latent + 1, last];
    };
    const markAt = (cell) => value.marks.find((mark) => mark.cell === cell);
    const canMove = () => value.mode === "images";
    const canToggle = () => value.mode === "video";
    const canNoise = () => ["image", "images", "video"].includes(value.mode);
    const bridged = (cell) => value.bridge && cell >= value.bridge[0] && cell < value.bridge[1];

    function nameOf(cell) {
      const mark = markAt(cell);
      if (!mark) return t(bridged(cell) ? "timeline.bridge" : "timeline.free");
      if (mark.role && mark.role !== "picture") return t(`timeline.${mark.role}`);
      if (value.mode === "video") return t("timeline.video");
      return t("timeline.picture", { number: value.marks.indexOf(mark) + 1 });
    }

    function placeOf(cell) {
      const [first, last] = framesOf(cell);
      const frames = t(first === last ? "timeline.frame" : "timeline.frames", { first, last });
      return t("timeline.cell", { index: cell, frames, seconds: pusa.number(first / value.fps) });
    }

    // ---- drawing ----

    function draw() {
      if (!value) return;
      root.hidden = value.mode === "none";
      const seconds = pusa.number(value.frames / value.fps);
      summary.textContent = t("timeline.summary", { latents: value.count, frames: value.frames, seconds });
      strip.setAttribute("aria-label", `${t("timeline.title")}: ${summary.textContent}`);
      root.style.setProperty("--count", value.count);
      focused = Math.min(focused, value.count - 1);
      const hadFocus = strip.contains(document.activeElement);
      const cells = Array.from({ length: value.count }, (_, cell) => drawCell(cell));
      strip.replaceChildren(...cells);
      if (hadFocus) cells[focused].focus({ preventScroll: true });
      drawRuler();
      drawReadout();
      problem.textContent = value.error ? value.error.text || t(value.error.key, value.error.values) : "";
      help.textContent = `${pusa.has(`timeline.help.${value.mode}`) ? t(`timeline.help.${value.mode}`) : ""} ${t("timeline.legend")}`;
    }

    function drawCell(cell) {
      const mark = markAt(cell);
      const noise = mark ? mark.noise : 1;
      const label = `${placeOf(cell)}: ${nameOf(cell)}`;
      const told = mark ? `${nameOf(cell)}, ${t("timeline.noise", { noise: pusa.number(noise) })}` : null;
      const isSlider = mark && canNoise();
      const picture = mark?.src
        ? h("img", { src: mark.src, alt: "", draggable: "false" })
        : thumbnailOf(cell) ? h("img", { src: thumbnailOf(cell), alt: "", draggable: "false" }) : null;
      return h(
        `div.tl-cell${mark ? ".is-given" : ""}${bridged(cell) ? ".is-bridge" : ""}${mark && canMove() ? ".is-movable" : ""}`,
        {
          tabindex: cell === focused ? "0" : "-1",
          role: isSlider ? "slider" : canToggle() || canMove() ? "button" : "img",
          "aria-label": isSlider ? placeOf(cell) : label,
          "aria-orientation": isSlider ? "vertical" : null,
          "aria-valuemin": isSlider ? 0 : null,
          "aria-valuemax": isSlider ? 1 : null,
          "aria-valuenow": isSlider ? noise : null,
          "aria-valuetext": isSlider ? told : null,
          "data-cell": cell,
          title: mark ? `${placeOf(cell)}\n${told}` : label,
          style: `--noise:${noise}`,
        },
        picture, h("span.tl-grain"), h("span.tl-index", {}, String(cell)),
        mark ? h("span.tl-level", {}, String(noise).replace(/^0\./, ".")) : null,
        mark && canMove() ? h("span.tl-number", {}, String(value.marks.indexOf(mark) + 1)) : null,
      );
    }

    function drawRuler() {
      const width = (strip.clientWidth || 400) / value.count;
      const every = Math.max(1, Math.ceil(MIN_LABEL_PIXELS / width));
      ruler.replaceChildren(...Array.from({ length: value.count }, (_, cell) => {
        const [first] = framesOf(cell);
        const shown = cell % every === 0;
        return h("span", {}, shown ? [`${pusa.number(first / value.fps)} s`, h("small", {}, `${first}`)] : null);
      }));
    }

    function drawReadout() {
      const mark = markAt(focused);
      const button = (key, icon, act, enabled) =>
        h("button.pusa-quiet", { type: "button", "aria-label": t(key), title: t(key), disabled: !enabled, onclick: act, "data-act": key }, icon);
      const tools = [];
      if (mark && canMove()) {
        tools.push(button("timeline.earlier", pusa.icon("left"), () => move(mark, -1), free(mark, -1) !== null));
        tools.push(button("timeline.later", pusa.icon("right"), () => move(mark, 1), free(mark, 1) !== null));
      }
      if (mark && canNoise()) {
        tools.push(button("timeline.noise_less", "−", () => setNoise(mark, mark.noise - STEP), mark.noise > 0));
        tools.push(h("output.tl-noise", {}, t("timeline.noise", { noise: mark.noise.toFixed(2) })));
        tools.push(button("timeline.noise_more", "+", () => setNoise(mark, mark.noise + STEP), mark.noise < 1));
      }
      if (canToggle()) {
        tools.push(h("button.pusa-quiet.is-text", { type: "button", onclick: () => toggle(focused) }, t(mark ? "timeline.release" : "timeline.keep")));
      }
      const again = readout.contains(document.activeElement) ? document.activeElement.dataset.act : null;
      readout.replaceChildren(h("span.tl-place", {}, h("b", {}, placeOf(focused)), " · ", nameOf(focused)), h("span.tl-tools", {}, tools));
      if (again) readout.querySelector(`[data-act="${again}"]`)?.focus();
    }

    // ---- edits ----

    function changed(say, soon = 0) {
      props.value = { ...value, marks: value.marks.map((mark) => ({ ...mark })), error: null, asked };
      value = props.value;
      editedAt = performance.now();
      asked += 1;
      draw();
      if (say) spoken.textContent = say;
      clearTimeout(timer);
      timer = setTimeout(() => tell("edit"), soon);
    }

    function setNoise(mark, noise, soon = 120) {
      if (!canNoise() || round(noise) === mark.noise) return;
      mark.noise = round(noise);
      changed("", soon);
    }

    /** Return the next cell without a mark in a direction, or null. */
    function free(mark, direction) {
      for (let cell = mark.cell + direction; cell >= 0 && cell < value.count; cell += direction) {
        if (!markAt(cell)) return cell;
      }
      return null;
    }

    function move(mark, direction) {
      const cell = free(mark, direction);
      if (cell !== null) moveTo(mark, cell);
    }

    function moveTo(mark, cell, soon = 120) {
      mark.cell = cell;
      mark.place = null;
      focused = cell;
      changed(t("timeline.moved", { index: cell }), soon);
    }

    function toggle(cell) {
      const mark = markAt(cell);
      if (mark) value.marks = value.marks.filter((other) => other !== mark);
      else {
        const before = value.marks.filter((other) => other.cell < cell).sort((a, b) => b.cell - a.cell)[0];
        value.marks = [...value.marks, { cell, noise: before ? before.noise : 0, place: null }];
      }
      focused = cell;
      changed(`${nameOf(cell)}`);
    }

    function click(cell) {
      focused = cell;
      if (canToggle()) return toggle(cell);
      const mark = markAt(cell);
      if (mark) selected = value.marks.indexOf(mark);
      else if (canMove() && value.marks.length) return moveTo(value.marks[Math.min(selected, value.marks.length - 1)], cell);
      draw();
    }

    // ---- pointer and keys ----

    const cellOf = (event) => {
      const found = document.elementFromPoint(event.clientX, event.clientY)?.closest(".tl-cell");
      return found && strip.contains(found) ? Number(found.dataset.cell) : null;
    };

    strip.addEventListener("pointerdown", (event) => {
      const cell = cellOf(event);
      if (cell === null || event.button) return;
      const mark = markAt(cell);
      drag = { cell, mark, x: event.clientX, y: event.clientY, noise: mark?.noise, kind: null, height: strip.clientHeight };
      strip.setPointerCapture(event.pointerId);
    });
    strip.addEventListener("pointermove", (event) => {
      if (!drag) return;
      const x = event.clientX - drag.x, y = event.clientY - drag.y;
      if (!drag.kind && Math.max(Math.abs(x), Math.abs(y)) > DRAG_PIXELS) {
        drag.kind = !drag.mark ? "nothing" : Math.abs(y) > Math.abs(x) && canNoise() ? "noise" : canMove() ? "move" : "nothing";
        if (drag.mark) { focused = drag.cell; selected = value.marks.indexOf(drag.mark); }
        root.classList.toggle("is-dragging", drag.kind === "move");
      }
      const mark = drag.mark && value.marks[selected];
      if (drag.kind === "noise") setNoise(mark, Math.round((drag.noise - y / drag.height) / STEP) * STEP, 200);
      if (drag.kind === "move") {
        const cell = cellOf(event);
        if (cell !== null && cell !== mark.cell && !markAt(cell)) moveTo(mark, cell, 200);
      }
    });
    const end = (event) => {
      if (drag && !drag.kind && event.type === "pointerup") click(drag.cell);
      if (drag) strip.querySelector(`[data-cell="${focused}"]`)?.focus({ preventScroll: true });
      drag = null;
      root.classList.remove("is-dragging");
    };
    strip.addEventListener("pointerup", end);
    strip.addEventListener("pointercancel", () => { drag = null; });

    strip.addEventListener("wheel", (event) => {
      const cell = cellOf(event);
      const mark = cell === null ? null : markAt(cell);
      if (!mark || !canNoise() || Math.abs(event.deltaX) > Math.abs(event.deltaY)) return;
      event.preventDefault();
      focused = cell;
      setNoise(mark, mark.noise - Math.sign(event.deltaY) * STEP, 200);
    }, { passive: false });

    strip.addEventListener("focusin", (event) => {
      const cell = Number(event.target.dataset.cell);
      if (Number.isNaN(cell) || cell === focused) return;
      strip.querySelector(`[data-cell="${focused}"]`)?.setAttribute("tabindex", "-1");
      focused = cell;
      event.target.setAttribute("tabindex", "0");
      drawReadout();
    });

    strip.addEventListener("keydown", (event) => {
      const mark = markAt(focused);
      const go = (cell) => {
        const target = Math.min(value.count - 1, Math.max(0, cell));
        strip.querySelector(`[data-cell="${target}"]`).focus();
        strip.querySelector(`[data-cell="${target}"]`).scrollIntoView({ block: "nearest", inline: "nearest" });
      };
      const moves = event.shiftKey && mark && canMove();
      const actions = {
        ArrowLeft: () => (moves ? move(mark, -1) : go(focused - 1)),
        ArrowRight: () => (moves ? move(mark, 1) : go(focused + 1)),
        Home: () => go(0),
        End: () => go(value.count - 1),
        ArrowUp: () => mark && setNoise(mark, mark.noise + STEP),
        ArrowDown: () => mark && setNoise(mark, mark.noise - STEP),
        PageUp: () => mark && setNoise(mark, mark.noise + 4 * STEP),
        PageDown: () => mark && setNoise(mark, mark.noise - 4 * STEP),
        Enter: () => click(focused),
        " ": () => click(focused),
        Delete: () => mark && canToggle() && toggle(focused),
      };
      if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      actions[event.key]();
    });

    // ---- pictures of a video's frames: the browser makes them, so that the server opens no stranger's file ----

    const pictures = new Map();  // "address time" -> data URL, or "" until the browser has made it

    /** Return the picture of a cell: [video's address, seconds from its start, or from its end if negative]. */
    function momentOf(cell) {
      const mark = markAt(cell);
      const first = framesOf(cell)[0];
      if (value.mode === "video") return [value.video, (first + 0.5) / value.fps];
      if (mark?.role === "video_end") {
        const kept = value.marks.filter((other) => other.role === "video_end").length;
        return [value.video, (first + 0.5 - framesOf(kept - 1)[1] - 1) / value.fps];
      }
      if (mark?.role === "video_start") {
        const from = Math.min(...value.marks.filter((other) => other.role === "video_start").map((other) => other.cell));
        return [value.second_video, (value.frames_per_latent * (cell - from) + 0.5) / value.fps];
      }
      return [null, 0];
    }

    function thumbnailOf(cell) {
      const [src, seconds] = momentOf(cell);
      return src ? pictures.get(`${src} ${seconds}`) || null : null;
    }

    const tries = new Map();  // address -> number of failed reads
    let reading = Promise.resolve();
    function readPictures() {
      const wanted = new Map();
      for (let cell = 0; cell < value.count; cell += 1) {
        const [src, seconds] = momentOf(cell);
        if (!src || pictures.has(`${src} ${seconds}`)) continue;
        pictures.set(`${src} ${seconds}`, "");
        wanted.set(src, [...(wanted.get(src) || []), seconds]);
      }
      for (const [src, moments] of wanted) {
        reading = reading.then(() => read(src, moments)).catch(() => forget(src, moments));
      }
    }

    /** Retry a slow video at the next drawing; one that the browser cannot play has no pictures. */
    function forget(src, moments) {
      tries.set(src, (tries.get(src) || 0) + 1);
      if (tries.get(src) > 2) return;
      for (const moment of moments) if (!pictures.get(`${src} ${moment}`)) pictures.delete(`${src} ${moment}`);
      if (!drag) take();
    }

    async function read(src, moments) {
      const video = h("video", { muted: true, preload: "auto", playsinline: true });
      const once = (name) => new Promise((done, failed) => {
        video.addEventListener(name, done, { once: true });
        video.addEventListener("error", () => failed(new Error("this browser does not play it")), { once: true });
        setTimeout(() => failed(new Error("took too long")), 15000);
      });
      const loaded = once("loadeddata");
      video.src = src;
      await loaded;
      const scale = 96 / Math.max(1, Math.min(video.videoWidth, video.videoHeight));
      const canvas = h("canvas");
      canvas.width = Math.max(1, Math.round(video.videoWidth * Math.min(1, scale)));
      canvas.height = Math.max(1, Math.round(video.videoHeight * Math.min(1, scale)));
      for (const moment of moments) {
        const seconds = moment < 0 ? Math.max(0, video.duration + moment) : moment;
        if (seconds > video.duration + 0.05) continue;
        const seeked = once("seeked");
        video.currentTime = Math.min(seconds, Math.max(0, video.duration - 0.01));
        await seeked;
        canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
        pictures.set(`${src} ${moment}`, canvas.toDataURL("image/webp", 0.8));
      }
      video.removeAttribute("src");
      video.load();
      if (!drag) draw();
    }

    function take() {
      value = props.value;
      if (!value) return;
      if ("estimate" in value) pusa.showEstimate?.(value.estimate);
      readPictures();
      draw();
    }
    // ---- refresh from the fields ----

    /** Refresh from the fields: once, after all of them have changed and nobody drags on the timeline. */
    pusa.fieldsChanged = () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => {
        if (drag || performance.now() - editedAt < EDIT_MS) return pusa.fieldsChanged();
        asked += 1;
        props.value = { ...value, asked };
        value = props.value;
        tell("refresh");
      }, SETTLE_MS);
    };
    watch("value", () => {
      const answers = props.value?.asked;
      if (drag || (answers && answers !== asked)) {  // an answer to an older call
        props.value = value;
        return;
      }
      take();
      if (!answers) pusa.fieldsChanged();  // it came with changes of other fields, some of which may follow
    });
    new ResizeObserver(() => { if (value && !drag) drawRuler(); }).observe(strip);
    take();
  };
})();
