// Show the gallery: all videos of the visitor from the durable queue, the newest first.
(() => {
  const { h, t } = pusa;

  pusa.gallery = (element) => {
    let jobs = [], more = false, asked = 0;
    const grid = h("ul.ga-grid");
    const none = h("p.pusa-note.ga-none", {}, t("gallery.empty"));
    const further = h("button.pusa-button", { type: "button", hidden: true, onclick: () => load(jobs.at(-1)?.id) }, t("gallery.more"));
    element.firstElementChild.replaceChildren(h("section", { "aria-labelledby": "ga-title" }, h("h2", { id: "ga-title" }, t("gallery.title")), none, grid, further));

    function card(job) {
      const done = job.has.thumbnail;
      const current = job.id === pusa.followed();
      const still = done ? h("img", { src: pusa.media(job, "thumbnail"), alt: "", loading: "lazy" }) : h("span.ga-noise", { "data-status": job.status });
      const prompt = job.prompt || t("gallery.no_prompt");
      const open = h("button", {
        type: "button", "aria-label": t("gallery.open", { prompt }), "aria-current": current ? "true" : null, title: job.prompt,
        onclick: () => {
          pusa.follow(job.id);
          document.querySelector("#pusa-result")?.scrollIntoView({ behavior: "smooth", block: "start" });
        },
      }, h("span.ga-picture", {}, still, job.status === "completed" ? null : h("span.ga-status", { "data-status": job.status }, t(`gallery.status.${job.status}`))),
      h("span.ga-prompt", {}, prompt), h("span.ga-facts", {}, `${job.size.replace("x", " × ")} · ${pusa.ago(job.created_at)}`));
      if (job.status === "completed" && job.has.video) moving(open, job);
      return h("li", {}, open);
    }

    /** Play the video while it has the pointer or the focus. */
    function moving(open, job) {
      let video = null;
      const place = open.querySelector(".ga-picture");
      const start = () => {
        if (video || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
        video = h("video", { src: pusa.media(job, "video"), muted: true, loop: true, playsinline: true, autoplay: true, "aria-hidden": "true" });
        video.muted = true;
        place.append(video);
      };
      const stop = () => { video?.remove(); video = null; };
      open.addEventListener("pointerenter", start);
      open.addEventListener("focus", start);
      open.addEventListener("pointerleave", stop);
      open.addEventListener("blur", stop);
    }

    function draw() {
      const key = JSON.stringify([jobs.map((job) => [job.id, job.status, job.has]), pusa.followed()]);
      if (key !== grid.dataset.key) grid.replaceChildren(...jobs.map(card));
      grid.dataset.key = key;
      none.hidden = jobs.length > 0;
      further.hidden = !more;
    }

    async function load(after) {
      const mine = ++asked;
      try {
        const page = await pusa.ask(`jobs${after ? `?after=${after}` : ""}`);
        if (mine !== asked) return;
        const rest = after ? jobs : [];
        const older = after ? [] : jobs.slice(page.jobs.length).filter((job) => !page.jobs.some((other) => other.id === job.id));
        jobs = [...rest, ...page.jobs, ...older];
        more = after || !older.length ? page.more : more;
        draw();
      } catch { /* the next poll finds it */ }
    }
    pusa.refreshGallery = () => load();
    pusa.onState((state) => {
      draw();
      if (state.job && jobs.some((job) => job.id === state.job.id && job.status !== state.job.status)) load();
    });
    load();
  };
})();
