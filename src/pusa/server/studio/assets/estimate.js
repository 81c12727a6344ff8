// Show what the video of the form would need, above the button: how the model runs, memory, time.
(() => {
  const { h, t } = pusa;
  const gigabytes = (bytes) => `${pusa.number(bytes >= 1e10 ? Math.round(bytes / 1e9) : Math.round(bytes / 1e8) / 10)} GB`;

  pusa.estimate = (element) => {
    const place = element.firstElementChild;
    let wasReady = null;
    place.setAttribute("role", "status");

    /** Draw {plan, problem, gpu_bytes, ram_bytes, seconds}; null draws nothing. The timeline's answers hold it. */
    pusa.showEstimate = (found) => {
      if (!found) return place.replaceChildren();
      const parts = [found.plan];
      if (!found.problem) {
        if (found.gpu_bytes) parts.push(t("estimate.gpu", { memory: gigabytes(found.gpu_bytes) }));
        if (found.ram_bytes) parts.push(t("estimate.ram", { memory: gigabytes(found.ram_bytes) }));
        if (found.seconds !== null) parts.push(t("estimate.seconds", { time: pusa.time(found.seconds) }));
      }
      place.replaceChildren(h(`p.pusa-note${found.problem ? ".is-problem" : ""}`, {}, parts.filter(Boolean).join(" · ")));
    };
    // The machine of a worker is known once it has begun to load the model.
    pusa.onState((state) => {
      const ready = Boolean(state.model?.ready);
      if (ready !== wasReady) pusa.fieldsChanged?.();
      wasReady = ready;
    });
  };
})();
