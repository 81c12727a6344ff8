// Show the page's head (name, state of the model, language, theme), and the error under the button.
(() => {
  const { h, t } = pusa;

  pusa.header = (element, props) => {
    const model = h("span.pusa-model", { role: "status" });
    const language = h(
      "select.pusa-language",
      { "aria-label": t("header.language"), onchange: () => { pusa.keep("pusa.language", language.value); reload(); } },
      Object.entries(pusa.languages).map(([code, name]) => h("option", { value: code, selected: code === pusa.language }, name)),
    );
    const theme = h("button.pusa-quiet", { type: "button", onclick: () => { pusa.setTheme(pusa.theme() === "dark" ? "light" : "dark"); drawTheme(); } });
    const drawTheme = () => {
      const other = pusa.theme() === "dark" ? "light" : "dark";
      theme.replaceChildren(pusa.icon(other === "dark" ? "moon" : "sun"));
      theme.setAttribute("aria-label", t(`header.theme.${other}`));
      theme.title = t(`header.theme.${other}`);
    };
    drawTheme();
    const mark = h("span.pusa-mark", { "aria-hidden": "true" }, [0, 1, 2, 3, 4].map((n) => h("i", { style: `--n:${n}` })));
    element.firstElementChild.replaceChildren(
      h("a.pusa-skip", { href: "#pusa-result" }, t("skip")),
      h("header.pusa-bar", {}, mark, h("h1", {}, "pusa ", h("span", {}, t("header.tagline"))), h("span.pusa-space"), model, language, theme),
    );
    let shown = "";
    pusa.onState((state) => {
      const found = state.model || { name: props.value.model };
      const kind = state.offline ? "unreachable" : found.ready ? "ready" : found.stage === "failed" ? "failed" : "loading";
      const percent = kind === "loading" && found.percent ? ` ${Math.round(found.percent)} %` : "";
      const text = `${found.name} · ${t(kind === "failed" ? "stage.model_failed" : `header.${kind}`)}${percent}`;
      if (text === shown) return;
      shown = text;
      model.dataset.kind = kind;
      model.replaceChildren(h("i"), text);
    });
  };

  function reload() {
    const address = new URL(location.href);
    address.searchParams.delete("lang");
    history.replaceState(null, "", address);
    location.reload();
  }

  pusa.problem = (element, props, watch) => {
    const place = element.firstElementChild;
    const draw = () => {
      const value = props.value;
      if (!value) return place.replaceChildren();
      pusa.showProblem(value.text || t(value.key, value.values));
    };
    pusa.showProblem = (text) => {
      const close = h("button.pusa-quiet", { type: "button", "aria-label": t("error.dismiss"), onclick: () => place.replaceChildren() }, pusa.icon("close"));
      place.replaceChildren(h("div.pusa-alert", { role: "alert" }, h("div", {}, h("strong", {}, t("error.title")), h("p", {}, text)), close));
      place.scrollIntoView({ block: "nearest" });
    };
    watch("value", draw);
    draw();
  };
})();
