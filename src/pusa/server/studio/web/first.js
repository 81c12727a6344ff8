// Runs before anything is drawn: the visitor's theme and language, so that nothing jumps.
{
  let prefs = {};
  try {
    prefs = JSON.parse(localStorage.getItem("pusa.prefs") || "{}");
  } catch {
    prefs = {}; // the browser stores nothing, or another program's text is there
  }
  const dark = prefs.theme ? prefs.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const languages = LANGUAGES;
  const wanted = [prefs.language, ...navigator.languages].filter(Boolean);
  const found = wanted.map((one) => languages.find((known) => one.toLowerCase().split("-")[0] === known));
  document.documentElement.lang = found.find(Boolean) || "en";
}
