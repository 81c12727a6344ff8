// Set the language and theme that the visitor has chosen, or the browser's, before the browser draws anything.
(() => {
  const asked = new URLSearchParams(location.search).get("lang");
  const kept = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
  const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* a private window forgets */ } };
  const known = Object.keys(pusa.languages);
  if (known.includes(asked)) keep("pusa.language", asked);
  const wanted = [kept("pusa.language"), ...navigator.languages].filter(Boolean).map((tag) => tag.slice(0, 2));
  pusa.language = wanted.find((tag) => known.includes(tag)) || "en";
  pusa.keep = keep;
  pusa.kept = kept;
  // Gradio takes its language from the browser alone.
  const told = { zh: "zh-CN" }[pusa.language] || pusa.language;
  Object.defineProperty(navigator, "language", { get: () => told, configurable: true });
  Object.defineProperty(navigator, "languages", { get: () => [told], configurable: true });
  document.documentElement.lang = pusa.language;

  // Gradio sets the class `dark` on the body by the system's theme. The visitor's choice wins.
  const system = matchMedia("(prefers-color-scheme: dark)");
  pusa.theme = () => kept("pusa.theme") || (system.matches ? "dark" : "light");
  const apply = () => {
    const dark = pusa.theme() === "dark";
    document.documentElement.classList.toggle("pusa-dark", dark);
    if (document.body && document.body.classList.contains("dark") !== dark) document.body.classList.toggle("dark", dark);
  };
  pusa.setTheme = (theme) => { keep("pusa.theme", theme); apply(); };
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    new MutationObserver(apply).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    apply();
  });
})();
