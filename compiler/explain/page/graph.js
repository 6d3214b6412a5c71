// The graph: the whole network, or one level of it in which modules are boxes that open.
const canvas = at("canvas"), svg = canvas.querySelector("svg"), view = at("view");
const flat = view.querySelector("g"), NEAR = 0.5;  // below it small letters cannot be read
const flatSize = {width: svg.viewBox.baseVal.width, height: svg.viewBox.baseVal.height};
const boxes = new Map([...flat.querySelectorAll(".place")].map(box => [nameOf(box), box]));
const startsWhole = kernels.length <= 40 || levels.size === 1;
const TOP = "^", WHOLE = "*";  // in the address; modules are never called so
let drawing = flat, extent = flatSize, shown = null;

function nameOf(box) {
  return box.dataset.kernel || box.dataset.place;
}
// The level that is shown; null for the whole network.
function level() {
  if (state.module === WHOLE || (!state.module && startsWhole)) return null;
  return levels.get(state.module === TOP ? "" : state.module) || null;
}
function inside(level) {
  return level.places.map(name => places.get(name));
}
function pathOf(name) {
  const [, path, part] = name.match(/^(.*?)(?:#(\d+))?$/s);
  return part > 1 ? `${path} (part ${part})` : path;
}
function labelOf(level) {
  const around = level.parent ? `${pathOf(level.parent)}.` : "", path = pathOf(level.name);
  return around && path.startsWith(around) ? path.slice(around.length) : path;
}
// The innermost level in which a place has a box of its own.
const home = new Map();
for (const level of levels.values())
  for (const [name, kind] of level.boxes) if (kind === "place") home.set(name, level.name);

function short(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}\u2026`;
}
function lettered(lines) {
  return lines.map(([name, y, text]) => {
    const made = drawn("text", {class: name, x: 10, y});
    made.textContent = text;
    return made;
  });
}
function far(text, width, height) {
  const pixels = Math.min(30, (width - 10) / (0.61 * text.length));
  const made = drawn("text", {class: "far", x: width / 2, y: height / 2 + pixels / 3});
  made.style.fontSize = `${pixels}px`;
  made.textContent = text;
  return made;
}
function moduleBox(name, width, height) {
  const held = inside(levels.get(name)), own = held.filter(p => p.what === "kernel");
  const label = labelOf(levels.get(name)), total = sum(own, cost);
  const {alone, now} = change(held.flatMap(p => p.nodes).map(n => nodes.get(n)));
  const ops = new Map();
  for (const kernel of own) ops.set(kernel.op, (ops.get(kernel.op) || 0) + 1);
  const most = [...ops].sort((a, b) => b[1] - a[1]).map(([op, n]) => `${n} ${op}`).join(", ");
  const made = drawn("g", {class: "level", "data-level": name, tabindex: 0, role: "button",
    "aria-label": `open ${pathOf(name)}`},
    drawn("rect", {class: "box", width, height, rx: 6}), ...lettered([
      ["title", 19, short(label, 22)], ["figures", 36, `${told(total)}, ${percent(total / whole)}`],
      ["figures", 51, `${alone.launches} \u2192 ${plural(now.launches, "launch")}`],
      ["figures", 66, short(most, 28)]]), far(short(label, 18), width, height));
  made.append(drawn("title", {}));
  made.lastChild.textContent = `${pathOf(name)}: ${most}\nclick to open`;
  return made;
}
function outsideBox(name, width, height) {
  const place = places.get(name), label = place.module_path || name;
  const made = drawn("g", {class: "outside", "data-outside": name},
    drawn("rect", {class: "box", width, height, rx: 6}),
    ...lettered([["outer", 16, label.length > 20 ? `\u2026${label.slice(-19)}` : label]]));
  return made;
}
function heat(box, value, largest) {
  box.style.setProperty("--share", `${(100 * value / (largest || 1)).toFixed(1)}%`);
}
for (const [name, box] of boxes) heat(box, cost(places.get(name)), most);

// Draws a level once; its kernels are copies of those in the whole picture.
const drawnLevels = new Map();
function draw(level) {
  if (drawnLevels.has(level.name)) return drawnLevels.get(level.name);
  const made = drawn("g", {transform: "translate(20 20)"});
  for (const [source, target, path] of level.paths)
    made.append(drawn("path", {class: "edge", "data-from": source, "data-to": target, d: path,
      "marker-end": "url(#arrow)"}));
  const costs = new Map(level.boxes.map(([name, kind]) => [name, kind === "level"
    ? sum(inside(levels.get(name)), cost) : kind === "place" ? cost(places.get(name)) : 0]));
  const largest = Math.max(...costs.values());
  for (const [name, kind, x, y, width, height] of level.boxes) {
    const box = kind === "place" ? boxes.get(name).cloneNode(true)
      : kind === "level" ? moduleBox(name, width, height) : outsideBox(name, width, height);
    box.setAttribute("transform", `translate(${x} ${y})`);
    heat(box, costs.get(name), largest);
    made.append(box);
  }
  drawnLevels.set(level.name, made);
  return made;
}

// Zooming and panning. Outside the SVG's own viewBox one unit is one pixel.
svg.removeAttribute("viewBox");
svg.setAttribute("role", "group");
let scale = 1, left = 0, top_ = 0, fitted = true;
function place() {
  view.setAttribute("transform", `translate(${left} ${top_}) scale(${scale})`);
  svg.classList.toggle("far", scale < NEAR);
}
function fit() {
  const box = canvas.getBoundingClientRect();
  scale = Math.min(box.width / extent.width, box.height / extent.height, 1.5);
  left = (box.width - extent.width * scale) / 2;
  top_ = (box.height - extent.height * scale) / 2;
  fitted = true;
  place();
}
function zoom(factor, x, y) {
  const next = Math.min(4, Math.max(0.02, scale * factor));
  left = x - (x - left) * next / scale;
  top_ = y - (y - top_) * next / scale;
  scale = next;
  fitted = false;
  place();
}
function zoomCentre(factor) {
  const box = canvas.getBoundingClientRect();
  zoom(factor, box.width / 2, box.height / 2);
}
// Moves the box into sight, unless it can be seen and read already.
function reveal(element) {
  const box = canvas.getBoundingClientRect(), it = element.getBoundingClientRect();
  const seen = it.left >= box.left && it.right <= box.right && it.top >= box.top
    && it.bottom <= box.bottom;
  if (seen && scale >= NEAR || !box.width) return;
  scale = Math.max(scale, 0.9);
  fitted = false;
  place();
  const now = element.getBoundingClientRect();
  left += box.left + box.width / 2 - (now.left + now.width / 2);
  top_ += box.top + box.height / 2 - (now.top + now.height / 2);
  place();
}
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - box.left, event.clientY - box.top);
}, {passive: false});
let grip = null, moved = false;
canvas.addEventListener("pointerdown", event => {
  grip = {x: event.clientX - left, y: event.clientY - top_};
  moved = false;
});
window.addEventListener("pointermove", event => {
  if (!grip) return;
  const x = event.clientX - grip.x, y = event.clientY - grip.y;
  moved = moved || Math.abs(x - left) + Math.abs(y - top_) > 3;
  if (!moved) return;
  fitted = false;
  left = x;
  top_ = y;
  canvas.classList.add("dragged");
  place();
});
window.addEventListener("pointerup", () => {
  grip = null;
  canvas.classList.remove("dragged");
});
window.addEventListener("resize", () => fitted && fit());

function opened(target) {
  const box = target.closest(".level, .outside, .place");
  if (!box) return choose({kernel: ""});
  if (box.dataset.level) return choose({module: box.dataset.level, kernel: ""});
  const name = box.dataset.outside || nameOf(box), op = target.closest(".op");
  choose(op ? {node: op.dataset.node} : {kernel: name});
}
svg.addEventListener("click", event => moved || opened(event.target));
svg.addEventListener("keydown", event => {
  if (event.key === "Enter") opened(event.target);
});

// Colours.
let byCost = true;
function colour() {
  svg.classList.toggle("cost", byCost);
  at("colour").textContent = byCost ? "by kind" : "by cost";
  const entry = (text, background) => {
    const swatch = element("i");
    if (background) swatch.style.background = background;
    else swatch.className = "ramp";
    return element("span", "", swatch, text);
  };
  at("legend").replaceChildren(...(byCost
    ? [entry(timed ? "modelled time" : "bytes read and written", "")]
    : ledger.kinds.map(kind => entry(kind, `var(--${kind})`))));
}

function crumbs() {
  const trail = [];
  for (let step = shown; step; step = step.parent === null ? null : levels.get(step.parent))
    trail.unshift(step);
  at("crumbs").replaceChildren(...(shown ? trail.flatMap((step, index) => [
    ...(index ? [" / "] : []),
    step === shown ? element("b", labelOf(step) || "all modules")
      : button(labelOf(step) || "all modules", () => choose({module: step.name || TOP}))])
    : [element("b", "every kernel")]));
  at("whole").textContent = shown ? "every kernel" : "by module";
  at("whole").hidden = levels.size === 1;
}
function up() {
  if (shown && shown.parent !== null) choose({module: shown.parent || TOP, kernel: ""});
}
function toggleWhole() {
  choose({module: shown ? WHOLE : TOP, kernel: ""});
}
at("whole").addEventListener("click", toggleWhole);
at("fit").addEventListener("click", fit);
at("in").addEventListener("click", () => zoomCentre(1.25));
at("out").addEventListener("click", () => zoomCentre(0.8));
at("colour").addEventListener("click", () => {
  byCost = !byCost;
  colour();
});

function boxIn(name) {
  return [...drawing.querySelectorAll(".place")].find(box => nameOf(box) === name);
}
listeners.push(change => {
  if (state.view !== "graph") return;
  // What is selected is shown in the level where it has a box.
  const wanted = level();
  if (state.kernel && wanted && !("module" in change && !change.kernel)
      && !wanted.boxes.some(([name, kind]) => name === state.kernel && kind === "place")) {
    choose({module: home.get(state.kernel) || TOP});
    return;
  }
  const next = wanted ? draw(wanted) : flat;
  if (next !== drawing || shown !== wanted) {
    drawing.replaceWith(next);
    drawing = next;
    extent = wanted ? {width: wanted.width + 40, height: wanted.height + 40} : flatSize;
    shown = wanted;
    fit();
  } else if (fitted) fit();
  crumbs();
  mark();
  for (const old of svg.querySelectorAll(".chosen")) old.classList.remove("chosen");
  const box = state.kernel ? boxIn(state.kernel) : null;
  for (const edge of drawing.querySelectorAll(".edge"))
    edge.classList.toggle("near", box !== null && [edge.dataset.from, edge.dataset.to]
      .includes(state.kernel));
  if (!box) return;
  box.classList.add("chosen");
  for (const op of box.querySelectorAll(".op"))
    if (op.dataset.node === state.node) op.classList.add("chosen");
  if (change.kernel || change.node) reveal(box);
});

// What is searched for.
const texts = new Map(ledger.nodes.map(node => [node.node, [node.node, node.op, node.module_path,
  ...node.rules.map(named), ...node.refused.map(r => `${r.label} ${r.rule} ${r.reason}`)].join(" ")
  .toLowerCase()]));
const placeTexts = new Map(ledger.places.map(place => [place.name, [place.name, place.computes,
  place.module_path, place.kind, place.what].join(" ").toLowerCase()]));
let foundNodes = new Set(), foundPlaces = new Set();
function mark() {
  for (const old of svg.querySelectorAll(".hit")) old.classList.remove("hit");
  svg.classList.toggle("found", state.find !== "");
  if (!state.find) return;
  for (const box of drawing.querySelectorAll(".place"))
    box.classList.toggle("hit", foundPlaces.has(nameOf(box)));
  for (const box of drawing.querySelectorAll(".level"))
    box.classList.toggle("hit", levels.get(box.dataset.level).places.some(p => foundPlaces.has(p)));
  for (const op of drawing.querySelectorAll(".op"))
    op.classList.toggle("hit", foundNodes.has(op.dataset.node));
}
