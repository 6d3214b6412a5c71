// Views, searching, keys, and the address that the page was opened with.
const search = at("search");
let turn = 0;
function find() {
  const wanted = state.find.toLowerCase();
  const hits = map => new Set(wanted ? [...map].filter(([, text]) => text.includes(wanted))
    .map(([name]) => name) : []);
  foundNodes = hits(texts);
  const own = hits(placeTexts);
  foundPlaces = new Set([...own, ...[...foundNodes].map(name => nodes.get(name).place)]);
  at("hits").textContent = wanted ? `${foundNodes.size + own.size} found` : "";
  turn = 0;
}
listeners.unshift(change => {
  if ("find" in change) {
    find();
    if (search.value !== state.find) search.value = state.find;
  }
  for (const view of VIEWS) {
    at(view).hidden = view !== state.view;
    const tab = at(`tab-${view}`);
    tab.setAttribute("aria-selected", String(view === state.view));
    tab.tabIndex = view === state.view ? 0 : -1;
  }
});
search.addEventListener("input", () => choose({find: search.value.trim()}));
search.addEventListener("keydown", event => {
  if (event.key === "Escape") {
    choose({find: ""});
    search.blur();
  }
  const found = [...foundNodes].map(node => ({node}));
  const covered = new Set([...foundNodes].map(name => nodes.get(name).place));
  found.push(...[...foundPlaces].filter(name => !covered.has(name)).map(kernel => ({kernel})));
  if (event.key === "Enter" && found.length) choose(found[turn++ % found.length]);
});

VIEWS.forEach((view, index) => {
  const tab = at(`tab-${view}`);
  tab.addEventListener("click", () => choose({view}));
  tab.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: VIEWS.length - 1}[event.key];
    if (!step) return;
    const next = VIEWS[(index + step) % VIEWS.length];
    choose({view: next});
    at(`tab-${next}`).focus();
  });
});
function turnTheme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  root.dataset.theme = dark ? "light" : "dark";
}
function next(step) {
  const index = kernels.findIndex(kernel => kernel.name === state.kernel);
  const start = index < 0 && step < 0 ? 0 : index;
  const kernel = kernels[(start + step + kernels.length) % kernels.length];
  if (kernel) choose({kernel: kernel.name});
}
const KEYS = {
  "/": () => search.focus(), "?": () => at("help").showModal(), t: turnTheme,
  j: () => next(1), k: () => next(-1), a: toggleWhole, u: up, f: fit,
  c: () => at("colour").click(), "+": () => zoomCentre(1.25), "-": () => zoomCentre(0.8),
  Escape: () => choose({kernel: "", find: ""}),
};
VIEWS.forEach((view, index) => KEYS[index + 1] = () => choose({view}));
document.addEventListener("keydown", event => {
  if (event.target === search || at("help").open) return;
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});
at("theme").addEventListener("click", turnTheme);
at("ask").addEventListener("click", KEYS["?"]);

const totals = ledger.totals;
at("summary").textContent = `every op alone \u2192 this plan: ${totals.kernels_before} \u2192 `
  + `${plural(totals.kernels_after, "launch")}, ${size(totals.bytes_before)} \u2192 `
  + `${size(totals.bytes_after)} moved` + (timed ? `, ${us(totals.before.us)} \u2192 `
  + `${us(totals.after.us)} modelled for ${ledger.machine}` : "");
colour();
window.addEventListener("hashchange", follow);
follow();
