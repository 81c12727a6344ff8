// Show the stage: one job from the queue to the player. It polls the job; Gradio only names it.
(() => {
  const { h, t, icon } = pusa;
  const BUSY = ["queued", "in_progress"];

  pusa.stage = (element, props, watch, tell) => {
    const root = element.firstElementChild;
    let drawn = "", job = null, state = null, view = "settings", sure = false, preview = { step: -1, url: "" };
    const spoken = h("p.pusa-hidden", { role: "status" });
    const body = h("div.st-body");
    root.replaceChildren(h("h2.pusa-hidden", {}, t("stage.title")), spoken, body);

    const act = async (path, after) => {
      try {
        const answer = await pusa.post(path);
        await (after ? after(answer) : pusa.follow(answer.id));
      } catch (error) {
        pusa.showProblem(error.message);
      }
    };
    const button = (key, name, onclick, kind = "", more = {}) =>
      h(`button.pusa-button${kind}`, { type: "button", onclick, "data-act": key, ...more }, name ? icon(name) : null, h("span", {}, t(`stage.${key}`)));

    // ---- states ----

    function screen(ratio, ...children) {
      return h("div.st-screen", { style: `--ratio:${ratio || 1}` }, children);
    }

    function empty() {
      const model = state?.model;
      if (model && !model.ready && model.stage === "failed") {
        return [screen(1.6, h("div.st-words", {}, h("h3", {}, t("stage.model_failed")), h("p", {}, model.message || "")))];
      }
      const loading = model && !model.ready;
      return [screen(
        1.6,
        h("div.st-words", {},
          h("span.pusa-mark.is-large", { "aria-hidden": "true" }, [0, 1, 2, 3, 4, 5, 6].map((n) => h("i", { style: `--n:${n}` }))),
          h("h3", {}, t(loading ? "stage.loading.title" : "stage.empty.title")),
          h("p", {}, t(loading ? "stage.loading.text" : "stage.empty.text")),
          loading ? bar(model.percent, model.percent ? null : "is-waiting") : null,
          button("empty.action", "play", () => tell("run", { name: "penguin" }), ".is-primary"),
        ),
      )];
    }

    function bar(percent, kind) {
      const value = Math.round(percent || 0);
      return h(`div.st-bar${kind ? `.${kind}` : ""}`, {
        role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": kind ? null : value, "aria-label": t("stage.title"),
      }, h("i", { style: `width:${value}%` }));
    }

    function words() {
      const model = state.model;
      if (job.cancelling) return [t("stage.cancelling"), ""];
      if (job.status === "queued") {
        if (job.position) return [t("stage.queued"), t("stage.queued.ahead", { count: job.position })];
        return [t("stage.queued"), t(model && !model.ready ? "stage.queued.loading" : "stage.queued.next")];
      }
      const stage = pusa.has(`stage.${job.stage}`) && job.stage ? t(`stage.${job.stage}`) : t("stage.starting");
      const step = job.stage === "denoise" && job.steps ? t("stage.step", job) : "";
      const left = job.seconds_left !== null && job.step > 0 ? t("stage.left", { time: pusa.time(job.seconds_left) }) : "";
      return [[stage, step].filter(Boolean).join(", "), left];
    }

    function busy() {
      const [what, more] = words();
      return [
        screen(job.aspect, h("div.st-making", {}, h("span.st-noise"), h("img.st-preview", { alt: t("stage.preview"), hidden: true }))),
        h("div.st-progress", {},
          h("div.st-line", {}, h("strong.st-what", {}, what), h("span.st-more", {}, more)),
          bar(job.progress, job.status === "queued" ? "is-waiting" : null),
          h("p.st-prompt", {}, job.prompt),
          h("p.pusa-note.st-plan", {}, job.plan || ""),
          button("cancel", "close", () => act(`jobs/${job.id}/cancel`, () => pusa.follow(job.id)), "", { disabled: job.cancelling }),
        ),
      ];
    }

    function update() {
      const [what, more] = words();
      body.querySelector(".st-what").textContent = what;
      body.querySelector(".st-more").textContent = more;
      body.querySelector(".st-plan").textContent = job.plan || "";
      const value = Math.round(job.progress);
      const line = body.querySelector(".st-bar");
      line.firstElementChild.style.width = `${value}%`;
      line.classList.toggle("is-waiting", job.status === "queued");
      if (job.status !== "queued") line.setAttribute("aria-valuenow", value);
      body.querySelector("[data-act=cancel]").disabled = job.cancelling;
    }

    async function showPreview() {
      if (job.status !== "in_progress" || job.step === preview.step) return;
      preview.step = job.step;
      const id = job.id;
      try {
        const answer = await fetch(`studio/media/${id}/preview?${job.step}`, { cache: "no-store" });
        if (answer.status !== 200) return;
        const url = URL.createObjectURL(await answer.blob());
        const picture = body.querySelector(".st-preview");
        if (!picture || job?.id !== id) return URL.revokeObjectURL(url);
        picture.src = url;
        picture.hidden = false;
        if (preview.url) URL.revokeObjectURL(preview.url);
        preview.url = url;
      } catch { /* the next step has another */ }
    }

    function player() {
      return h("video.st-player", {
        src: pusa.media(job, "video"), controls: true, autoplay: true, loop: true, muted: true, playsinline: true,
        poster: job.has.thumbnail ? pusa.media(job, "thumbnail") : null, "aria-label": t("stage.player", { prompt: job.prompt }),
      });
    }

    function done() {
      const gone = !job.has.video;
      const tools = gone ? [] : [
        job.draft ? button("final", "play", () => act(`jobs/${job.id}/final`)) : null,
        h("a.pusa-button.is-primary", { href: pusa.media(job, "video"), download: `${job.id}.mp4`, "data-act": "download" }, icon("download"), h("span", {}, t("stage.download"))),
        button("last_frame", "frame", () => form("last_frame")),
        button("extend", "extend", () => form("extend_it")),
      ];
      return [
        gone ? screen(job.aspect, h("div.st-words", {}, h("p", {}, t("stage.expired")))) : screen(job.aspect, player()),
        h("div.st-tools", {}, tools, again(), remove()),
        about(),
      ];
    }

    function again() {
      return [
        button("again", "again", () => act(`jobs/${job.id}/again`)),
        button("vary", "dice", () => act(`jobs/${job.id}/again?vary_seed=true`)),
      ];
    }

    function remove() {
      return h(`button.pusa-button.is-quiet${sure ? "" : ".is-icon"}`, {
        type: "button", "data-act": "delete", "aria-label": t(sure ? "stage.delete.sure" : "stage.delete"), title: t("stage.delete"),
        onclick: () => {
          if (!sure) { sure = true; redraw(); setTimeout(() => { if (sure) { sure = false; redraw(); } }, 4000); return; }
          sure = false;
          act(`jobs/${job.id}/delete`, () => { pusa.follow(""); pusa.refreshGallery?.(); });
        },
      }, icon("trash"), sure ? h("span", {}, t("stage.delete.sure")) : null);
    }

    function redraw() {
      const tools = body.querySelector("[data-act=delete]");
      const focus = tools === document.activeElement;
      const now = remove();
      if (tools) tools.replaceWith(now);
      if (focus) now.focus();
    }

    function form(event) {
      tell(event, { job: job.id });
      document.querySelector("#pusa-form")?.scrollIntoView({ behavior: "smooth", block: "start" });
    }

    function ended() {
      const failed = job.status === "failed";
      return [
        screen(1.6, h("div.st-words", failed ? { role: "alert" } : {},
          h("h3", {}, t(failed ? "stage.failed" : "stage.cancelled")),
          h("p", {}, failed ? job.error || t("error.internal") : t("stage.cancelled.text")))),
        h("div.st-tools", {}, again(), remove()),
        about(),
      ];
    }

    // ---- settings of the video ----

    function about() {
      const sheet = job.has.contact_sheet;
      const tab = (name, key) => h("button", {
        type: "button", role: "tab", id: `st-tab-${name}`, "aria-selected": String(view === name), "aria-controls": "st-panel",
        tabindex: view === name ? "0" : "-1",
        onclick: () => { view = name; refill(); },
        onkeydown: (event) => {
          if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !sheet) return;
          view = view === "settings" ? "sheet" : "settings";
          refill();
          body.querySelector(`#st-tab-${view}`).focus();
        },
      }, t(key));
      const panel = h("div", { id: "st-panel", role: "tabpanel", "aria-labelledby": `st-tab-${view}` }, view === "sheet" && sheet ? contactSheet() : settings());
      return h("section.st-about", {},
        job.notes.length ? h("ul.st-notes", {}, job.notes.map((note) => h("li", {}, note))) : null,
        h("div.st-tabs", { role: "tablist" }, tab("settings", "stage.settings"), sheet ? tab("sheet", "stage.sheet") : null,
          h("span.pusa-space"),
          job.took_seconds ? h("span.pusa-note", {}, t("stage.took", { time: pusa.time(job.took_seconds) })) : null),
        panel);
    }

    function refill() {
      body.querySelector(".st-about").replaceWith(about());
    }

    function contactSheet() {
      return h("img.st-sheet", { src: pusa.media(job, "contact_sheet"), alt: t("stage.sheet"), loading: "lazy" });
    }

    function settings() {
      const rows = Object.entries(job.settings).map(([key, value]) => [h("dt", {}, t(`settings.${key}`)), h("dd", {}, shown(key, value))]);
      const copy = h("button.pusa-link", { type: "button", onclick: async () => {
        try {
          await navigator.clipboard.writeText(JSON.stringify(job.request, null, 2));
          copy.lastChild.textContent = t("stage.copied");
        } catch { copy.lastChild.textContent = t("error.title"); }
      } }, icon("copy"), h("span", {}, t("stage.copy")));
      return [h("dl.st-settings", {}, rows), copy];
    }

    function shown(key, value) {
      if (key === "task") return t(`task.${value}`);
      if (key === "preset") return t(`preset.${value}`);
      if (key === "frames") return t("length", { ...value, seconds: pusa.number(value.seconds), fps: pusa.number(value.fps) });
      if (key === "conditions") {
        return value.map((one) => h("div", {}, t(one.part ? `given.${one.part}` : `given.${one.kind}`, {
          positions: one.positions.join(", ") || (one.kind === "image" ? "0" : t("given.all")),
          noise: one.noise.map((n) => pusa.number(n)).join(", ") || "–",
        })));
      }
      return String(value);
    }

    // ---- following ----

    function draw(now) {
      state = now;
      if (now.following && now.unknown) return;  // no answer yet: keep the old picture for a moment
      if (now.following && now.job === null && !now.offline) {
        if (drawn === `gone ${now.following}`) return;
        drawn = `gone ${now.following}`;
        job = null;
        return body.replaceChildren(screen(1.6, h("div.st-words", {}, h("h3", {}, t("error.gone")), button("empty.action", "play", () => tell("run", { name: "penguin" })))));
      }
      const previous = job;
      job = now.job;
      if (!job) {
        const key = `empty ${now.model?.ready} ${now.model?.stage} ${Math.round(now.model?.percent || 0)}`;
        if (key !== drawn) body.replaceChildren(...empty());
        drawn = key;
        return;
      }
      const isBusy = BUSY.includes(job.status);
      const key = `${job.id} ${isBusy ? "busy" : job.status} ${job.has.video}`;
      if (key !== drawn) {
        if (previous?.id !== job.id) { preview = { step: -1, url: "" }; sure = false; }
        drawn = key;
        body.replaceChildren(...(isBusy ? busy() : job.status === "completed" ? done() : ended()));
        const said = { completed: "stage.done", failed: "stage.failed", cancelled: "stage.cancelled", queued: "stage.queued", in_progress: "stage.starting" };
        spoken.textContent = t(said[job.status]);
        pusa.refreshGallery?.();
      } else if (isBusy) update();
      if (isBusy) showPreview();
    }

    watch("value", () => {
      if (!props.value?.job) return;
      view = "settings";
      pusa.follow(props.value.job);
      if (matchMedia("(max-width: 900px)").matches) document.querySelector("#pusa-result").scrollIntoView({ behavior: "smooth", block: "start" });
    });
    body.replaceChildren(...empty());
    pusa.onState(draw);
  };
})();
