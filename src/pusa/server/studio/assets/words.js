// Show examples, help for the prompt, and words that the model does not know.
(() => {
  const { h, t } = pusa;

  pusa.examples = (element, props, watch, tell) => {
    const buttons = props.value.examples.map((example) =>
      h(
        "button.pusa-example",
        { type: "button", "aria-label": t("examples.run", { name: example.prompt }), title: example.prompt, "data-example": example.name, onclick: () => tell("run", { name: example.name }) },
        h("span.pusa-shows", {}, example.shows.map((src) => h("img", { src, alt: "", loading: "lazy" }))),
        h("span.pusa-example-text", {}, example.mode ? h("b", {}, t(`mode.${example.mode}`)) : null, example.prompt),
        h("span.pusa-go", { "aria-hidden": "true" }, pusa.icon("play")),
      ));
    element.firstElementChild.replaceChildren(
      h("p.pusa-label", { id: `try-${props.value.tab}` }, t("examples.title")),
      h("div.pusa-strip", { role: "group", "aria-labelledby": `try-${props.value.tab}` }, buttons),
    );
  };

  pusa.words = (element, props) => {
    const { model, known } = props.value;
    const unknown = h("div.pusa-unknown", { role: "status" });
    const kinds = Object.entries(known);
    const field = () => document.querySelector("#prompt textarea");
    const add = (phrase) => {
      const text = field().value.trim();
      pusa.type("#prompt", text ? `${text}${/^(the camera|a photo)/.test(phrase) ? ", " : " "}${phrase}` : phrase);
    };
    const chip = (phrase, act) => h("button.pusa-chip", { type: "button", onclick: act }, phrase);
    const article = (thing) => `${/^[aeiou]/.test(thing) ? "an" : "a"} ${thing}`;
    const any = (list) => list[Math.floor(Math.random() * list.length)];
    const surprise = () => {
      const camera = known.cameras && Math.random() < 0.25 ? `, ${any(known.cameras)}` : "";
      pusa.type("#prompt", `${article(any(known.things))} ${any(known.motions)} ${any(known.places)}${camera}`);
    };
    const parts = [unknown];
    if (kinds.length) {
      const title = h("summary", {}, t("words.title", { model }));
      const groups = kinds.map(([kind, phrases]) => [
        h("dt", {}, pusa.has(`words.${kind}`) ? t(`words.${kind}`) : kind),
        h("dd", {}, phrases.map((phrase) => chip(phrase, () => add(kind === "things" ? article(phrase) : phrase)))),
      ]);
      const dice = known.things && known.motions && known.places
        ? h("button.pusa-link", { type: "button", onclick: surprise }, pusa.icon("dice"), t("words.surprise")) : null;
      parts.push(h("div.pusa-words-bar", {}, h("details", {}, title, h("p.pusa-note", {}, t("words.info")), h("dl", {}, groups)), dice));
    }
    element.firstElementChild.replaceChildren(...parts);

    let asked = "", timer = 0;
    const look = async () => {
      const prompt = field()?.value ?? "";
      if (!kinds.length || prompt === asked) return;
      asked = prompt;
      const found = prompt.trim() ? await pusa.ask(`words?prompt=${encodeURIComponent(prompt)}`).catch(() => []) : [];
      if (prompt !== asked) return;
      unknown.replaceChildren(...found.slice(0, 3).map((one) =>
        h("p", {}, h("span", {}, t("words.unknown", { model }), " ", h("q", {}, one.word), "."),
          one.nearest.length ? [" ", t("words.nearest"), " ", one.nearest.map((phrase) => chip(phrase, () => swap(one.word, phrase)))] : null)));
    };
    const swap = (word, phrase) => {
      const text = field().value.replace(new RegExp(`(?<![\\p{L}])${word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}(?![\\p{L}])`, "iu"), phrase);
      pusa.type("#prompt", text);
      field().focus();
    };
    const later = () => { clearTimeout(timer); timer = setTimeout(look, 350); };
    // Gradio draws the field after this part, and writes into it without an event: hence a timer reads it.
    document.addEventListener("input", (event) => { if (event.target.closest("#prompt")) later(); });
    setInterval(() => { if (!document.hidden) look(); }, 1500);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#prompt")) {
        event.preventDefault();
        document.querySelector("#generate").click();
      }
    });
  };
})();
