// The kernels and the modules as tables, the roofline, the refusals.
function meter(value, largest, name = "meter") {
  const made = classed(name, element("span"));
  made.style.width = `${Math.max(0, 100 * value / (largest || 1))}%`;
  return made;
}
function number(text) {
  return classed("number", element("td", text));
}

// Kernels. Columns: heading, what to sort by, what to show.
const COLUMNS = [
  ["#", k => kernels.indexOf(k), k => number(String(kernels.indexOf(k) + 1))],
  ["kernel", k => k.name, k => classed("name", element("td", "", button(k.name, () =>
    choose({kernel: k.name}))))],
  ["module", k => k.module_path, k => classed("name", element("td", k.module_path))],
  ["kind", k => k.kind, k => element("td", k.kind)],
  ["ops", k => -k.nodes.length, k => number(String(k.nodes.length))],
  ["moves", k => -k.size_bytes, k => number(size(k.size_bytes))],
];
if (timed) COLUMNS.push(["bound by", k => k.bound, k => element("td", k.bound)],
  ["modelled", k => -(k.modelled.us || 0), k => number(k.modelled.us === null ? "" :
    us(k.modelled.us))]);
if (measured) COLUMNS.push(["measured", k => -(k.measured.us || 0), k =>
  number(k.measured.us === null ? "" : us(k.measured.us))]);
COLUMNS.push(["share", k => -cost(k), k => {
  const cell = element("td", "", element("div", "", meter(cost(k), most)));
  cell.title = percent(cost(k) / whole);
  return classed("bars", cell);
}]);
const byKernel = new Map();
let sorted = COLUMNS.length - 1, reversed = false;
function kernelTable() {
  const head = element("tr"), body = element("tbody");
  COLUMNS.forEach(([title], index) => {
    const cell = element("th", "", button(title, () => {
      reversed = sorted === index && !reversed;
      sorted = index;
      sortKernels(body, head);
    }, ""));
    cell.scope = "col";
    head.append(cell);
  });
  for (const kernel of kernels) {
    const row = classed("row", element("tr", "", ...COLUMNS.map(([, , show]) => show(kernel))));
    row.addEventListener("click", event => event.target.closest("button")
      || choose({kernel: kernel.name}));
    byKernel.set(kernel.name, row);
  }
  sortKernels(body, head);
  return classed("list", element("table", "", element("thead", "", head), body));
}
function sortKernels(body, head) {
  const key = COLUMNS[sorted][1], way = reversed ? -1 : 1;
  const order = [...kernels].sort((a, b) => {
    const x = key(a), y = key(b);
    const less = typeof x === "string" ? x.localeCompare(y, "en", {numeric: true}) : x - y;
    return way * (less || kernels.indexOf(a) - kernels.indexOf(b));
  });
  body.replaceChildren(...order.map(kernel => byKernel.get(kernel.name)));
  [...head.children].forEach((cell, index) => {
    if (index !== sorted) cell.removeAttribute("aria-sort");
    // Numbers come largest first.
    else cell.setAttribute("aria-sort", typeof key(kernels[0]) === "number" && index
      ? reversed ? "ascending" : "descending" : reversed ? "descending" : "ascending");
  });
}

// Modules: a tree of the module paths of the captured ops, with every op alone and as planned.
function moduleTree() {
  const top = {name: "", path: "", nodes: [], inside: new Map()};
  for (const node of ledger.nodes) {
    let module = top;
    const path = [];
    module.nodes.push(node);
    for (const part of node.module_path.split(".").filter(Boolean)) {
      path.push(part);
      if (!module.inside.has(part))
        module.inside.set(part, {name: part, path: path.join("."), nodes: [], inside: new Map()});
      module = module.inside.get(part);
      module.nodes.push(node);
    }
  }
  return top;
}
function moduleTable() {
  const top = moduleTree(), body = element("tbody");
  const figure = timed ? "us" : "bytes", unit = timed ? us : size;
  const largest = Math.max(...[...top.inside.values()].map(m => change(m.nodes).alone[figure]), 1);
  const titles = ["module", "ops", "launches alone", "planned", timed ? "modelled alone"
    : "moves alone", "planned", "alone, planned"];
  const head = element("tr", "", ...titles.map((title, index) => {
    const cell = element("th", "", element("span", title));
    if (index && index < 6) cell.className = "number";
    cell.scope = "col";
    return cell;
  }));
  function rows(module, depth, open) {
    const {alone, now} = change(module.nodes), children = [...module.inside.values()];
    const fold = button(children.length ? open ? "\u25be" : "\u25b8" : "", () => turn(), "fold");
    const label = button(module.name, () => children.length ? turn() : leaf(module));
    const first = classed("name", element("td", "", fold, label));
    first.style.paddingLeft = `${8 + 16 * depth}px`;
    const bars = classed("bars", element("td", "", element("div", "", meter(alone[figure], largest,
      "meter alone")), element("div", "", meter(now[figure], largest))));
    const row = element("tr", "", first, number(String(module.nodes.length)),
      number(String(alone.launches)), number(String(now.launches)), number(unit(alone[figure])),
      number(unit(now[figure])), bars);
    row.dataset.path = module.path;
    let below = null;
    const show = () => {
      below = children.map(child => rows(child, depth + 1, false));
      row.after(...below.flatMap(child => child.all()));
    };
    function turn() {
      if (below) {
        for (const child of below) for (const old of child.all()) old.remove();
        below = null;
      } else show();
      fold.textContent = below ? "\u25be" : "\u25b8";
      label.setAttribute("aria-expanded", String(below !== null));
    }
    if (children.length) label.setAttribute("aria-expanded", "false");
    fold.tabIndex = -1;
    fold.setAttribute("aria-hidden", "true");
    if (!children.length) fold.disabled = true;
    return {row, all: () => [row, ...(below || []).flatMap(child => child.all())]};
  }
  function leaf(module) {
    choose({node: module.nodes[0].node});
  }
  for (const module of top.inside.values()) body.append(rows(module, 0, false).row);
  const loose = top.nodes.filter(node => !node.module_path);
  if (loose.length) {
    const {alone, now} = change(loose);
    body.append(element("tr", "", element("td", "(no module)"), number(String(loose.length)),
      number(String(alone.launches)), number(String(now.launches)), number(unit(alone[figure])),
      number(unit(now[figure])), element("td")));
  }
  return classed("list", element("table", "", element("thead", "", head), body));
}

// Roofline (S. Williams, A. Waterman, D. Patterson, 2009): what kernels reach, by what they read.
const points = new Map();
function roofline() {
  if (!timed) return [element("p", `A roofline needs a plan for a GPU; this one is for `
    + `${ledger.target}. None needs to be there:`), element("pre",
    `convloom explain ${ledger.model} --target cuda:sm_90 --html FILE`)];
  const shown = kernels.filter(k => k.flops && k.size_bytes && k.modelled.us);
  const reach = (kernel, time) => kernel.flops / time / 1e6, {tflops} = ledger.peaks;
  const ridge = gbps => tflops / gbps * 1e3, across = k => k.flops / k.size_bytes;
  const X = [0.1, Math.max(ridge(ledger.peaks.memory_gbps) * 10, ...shown.map(across)) * 1.3];
  const Y = [Math.min(0.1, ...shown.map(k => reach(k, k.modelled.us))), tflops * 1.6];
  const W = 980, H = 560, L = 64, R = 16, T = 14, B = 46;
  const clip = (value, [low, high]) => Math.min(high, Math.max(low, value));
  const scaled = (value, range, from, to) => from + (to - from)
    * Math.log(clip(value, range) / range[0]) / Math.log(range[1] / range[0]);
  const x = value => scaled(value, X, L, W - R), y = value => scaled(value, Y, H - B, T);
  const letters = (text, attributes) => {
    const made = drawn("text", attributes);
    made.textContent = text;
    return made;
  };
  const plot = drawn("svg", {viewBox: `0 0 ${W} ${H}`, role: "group",
    "aria-label": "roofline of the kernels"});
  for (let power = Math.ceil(Math.log10(X[0])); 10 ** power <= X[1]; power++)
    plot.append(drawn("path", {class: "axis", d: `M${x(10 ** power)} ${T}V${H - B}`}),
      letters(String(+(10 ** power).toPrecision(1)), {x: x(10 ** power), y: H - B + 17,
        "text-anchor": "middle"}));
  for (let power = Math.ceil(Math.log10(Y[0])); 10 ** power <= Y[1]; power++)
    plot.append(drawn("path", {class: "axis", d: `M${L} ${y(10 ** power)}H${W - R}`}),
      letters(String(+(10 ** power).toPrecision(1)), {x: L - 8, y: y(10 ** power) + 4,
        "text-anchor": "end"}));
  plot.append(letters("FLOP per byte read and written", {x: (L + W - R) / 2, y: H - 8,
    "text-anchor": "middle"}), letters("TFLOP/s", {x: 14, y: T + 4}));
  for (const [gbps, name, from] of [[ledger.peaks.memory_gbps, "roof", "memory"],
    [ledger.peaks.cache_gbps, "roof dashed", "L2"]]) {
    const low = Math.max(X[0], Y[0] / gbps * 1e3);
    const middle = ridge(gbps) / 40, above = from === "L2";
    plot.append(drawn("path", {class: name, d: `M${x(low)} ${y(low * gbps / 1e3)}`
      + `L${x(ridge(gbps))} ${y(tflops)}`}), letters(`${from} ${gbps.toLocaleString("en")} GB/s`, {
      x: x(middle) + (above ? -8 : 8), y: y(tflops / 40) + (above ? -4 : 14),
      "text-anchor": above ? "end" : "start"}));
  }
  plot.append(drawn("path", {class: "roof", d: `M${x(ridge(ledger.peaks.cache_gbps))} ${y(tflops)}`
    + `H${W - R}`}), letters(`${tflops.toFixed(0)} TFLOP/s, ${ledger.dtype}`, {x: W - R - 4,
    y: y(tflops) - 6, "text-anchor": "end"}));
  for (const kernel of [...shown].sort((a, b) => cost(b) - cost(a))) {
    const point = drawn("circle", {class: "point", cx: x(across(kernel)), tabindex: 0,
      cy: y(reach(kernel, kernel.modelled.us)), r: 3 + 11 * Math.sqrt(cost(kernel) / most),
      role: "button", "data-point": kernel.name, "aria-label": `${kernel.name}, `
      + `${reach(kernel, kernel.modelled.us).toFixed(1)} TFLOP/s modelled`});
    const lines = [kernel.name, kernel.module_path, `${flops(kernel.flops)}, `
      + `${size(kernel.size_bytes)}, ${us(kernel.modelled.us)} modelled`,
      `bound by ${kernel.bound || "?"}`];
    if (kernel.measured.us) {
      lines.push(time(kernel.measured));
      plot.append(drawn("circle", {class: "point measured", cx: x(across(kernel)), r: 4,
        cy: y(reach(kernel, kernel.measured.us))}));
    }
    point.append(drawn("title", {}));
    point.lastChild.textContent = lines.join("\n");
    point.addEventListener("click", () => choose({kernel: kernel.name}));
    point.addEventListener("keydown", e => e.key === "Enter" && choose({kernel: kernel.name}));
    points.set(kernel.name, point);
    plot.append(point);
  }
  const bounds = new Map();
  for (const k of kernels) if (k.bound) bounds.set(k.bound, (bounds.get(k.bound) || 0) + cost(k));
  const parts = [...bounds].sort((a, b) => b[1] - a[1]).map(([bound, part]) =>
    `${bound} ${percent(part / whole)}`);
  const left = kernels.length - shown.length;
  return [plot, element("p", `Modelled time by what bounds it: ${parts.join(", ")}.`),
    classed("dim", element("p", `One circle for each kernel, as large as its modelled time; `
      + `rings are measured. Roofs are those of the cost model for ${ledger.machine}.`
      + (left ? ` ${plural(left, "kernel")} without arithmetic are not shown.` : "")))];
}

// Refusals by rule; each names its nodes, which can be clicked.
function refusals() {
  const rules = new Map();
  for (const event of ledger.events) {
    if (event.accepted) continue;
    const rule = named(event.rule);
    if (!rules.has(rule)) rules.set(rule, new Map());
    const reasons = rules.get(rule);
    if (!reasons.has(event.reason)) reasons.set(event.reason, []);
    reasons.get(event.reason).push(event.nodes.filter(name => nodes.has(name)));
  }
  const count = reasons => sum([...reasons.values()], groups => groups.length);
  const ranked = [...rules].sort((a, b) => count(b[1]) - count(a[1]));
  if (!ranked.length) return [element("p", "Nothing was refused.")];
  return ranked.map(([rule, reasons]) => {
    const title = element("summary", "", classed("count", element("span",
      `${count(reasons)} x`)), rule);
    const made = element("details", "", title);
    // Of hundreds of reasons only those that are looked at are made.
    made.addEventListener("toggle", () => made.open && made.children.length === 1
      && made.append(element("ul", "", ...[...reasons].map(([reason, groups]) =>
        element("li", "", element("p", "", ...linked(reason)), ...matches(groups))))));
    return made;
  });
}
// A button for every place where a rule was refused; it shows the ops there.
function matches(groups) {
  const row = element("div"), below = classed("nodes", element("div"));
  below.hidden = true;
  const path = name => nodes.get(name).module_path || name;
  for (const group of groups.filter(group => group.length)) {
    const ends = [...new Set([path(group[0]), path(group.at(-1))])];
    row.append(button(ends.join(" \u2026 "), () => {
      below.replaceChildren(...group.map(name =>
        button(`${nodes.get(name).op} ${path(name)}`, () => choose({node: name}))));
      below.hidden = false;
      choose({node: group[0]});
    }));
  }
  return [row, below];
}

const makers = {kernels: () => [kernelTable()], modules: () => [moduleTable()],
  roofline, refusals};
listeners.push(() => {
  if (state.view in makers) {
    at(state.view).replaceChildren(...makers[state.view]());
    delete makers[state.view];
  }
  for (const [name, row] of byKernel) {
    row.classList.toggle("chosen", name === state.kernel);
    row.hidden = state.find !== "" && !foundPlaces.has(name);
  }
  for (const [name, point] of points) point.classList.toggle("chosen", name === state.kernel);
  if (state.view === "kernels" && byKernel.has(state.kernel))
    byKernel.get(state.kernel).scrollIntoView({block: "nearest"});
});
