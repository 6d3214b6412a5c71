"use strict";
// The ledger, how its figures are written, and small helpers. Every text of it goes into the page
// as text (textContent, setAttribute), never as markup: names come from anybody's modules.
const ledger = JSON.parse(document.getElementById("ledger").textContent);
const at = id => document.getElementById(id);
const places = new Map(ledger.places.map(place => [place.name, place]));
const nodes = new Map(ledger.nodes.map(node => [node.node, node]));
const levels = new Map(ledger.levels.map(level => [level.name, level]));
const labels = new Map(ledger.events.filter(e => e.label).map(e => [e.rule, e.label]));
const kernels = ledger.places.filter(place => place.what === "kernel" || place.what === "torch");
// Times are of a GPU, or of nothing: a plan for the CPU has modelled none.
const timed = ledger.peaks !== null;
const measured = kernels.some(kernel => kernel.measured.us !== null);

function plural(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
}
function size(bytes) {
  for (const [unit, unitSize] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (Math.abs(bytes) >= unitSize) return `${(bytes / unitSize).toFixed(1)} ${unit}`;
  return plural(bytes, "byte");
}
function us(value) {
  return `${value.toLocaleString("en", {minimumFractionDigits: 1, maximumFractionDigits: 1})} us`;
}
function time(value) {
  return value.us === null ? value.how : `${us(value.us)} ${value.how}`;
}
function flops(count) {
  for (const [unit, unitSize] of [["TFLOP", 1e12], ["GFLOP", 1e9], ["MFLOP", 1e6]])
    if (count >= unitSize) return `${(count / unitSize).toFixed(1)} ${unit}`;
  return `${count.toLocaleString("en")} FLOP`;
}
function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}
// What a kernel costs: modelled microseconds where there are any, else bytes read and written.
function cost(place) {
  return timed ? place.modelled.us || 0 : place.size_bytes;
}
function told(value) {
  return timed ? us(value) : size(value);
}
const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const whole = sum(kernels, cost) || 1;
const most = Math.max(...kernels.map(cost), 1e-9);

// What the ops of some nodes cost alone, and what is left of that as planned.
function change(inside) {
  const alone = {launches: sum(inside, n => n.kernels_before), bytes: sum(inside, n =>
    n.bytes_before), us: sum(inside, n => n.before.us || 0)};
  return {alone, now: {launches: alone.launches - sum(inside, n => n.kernels_saved),
    bytes: alone.bytes - sum(inside, n => n.bytes_saved), us: sum(inside, n => n.after.us || 0)}};
}
function named(rule) {
  return labels.has(rule) ? `${labels.get(rule)}: ${rule}` : rule;
}

function element(name, text, ...inside) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...inside);
  return made;
}
function classed(name, made) {
  made.className = name;
  return made;
}
function button(text, act, name = "link") {
  const made = classed(name, element("button", text));
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}
function drawn(name, attributes, ...inside) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}
// A reason, in which every captured node is a button that leads to it.
function linked(reason) {
  return reason.split(/(%?\b[A-Za-z_]\w*\b)/).map(word => {
    const name = word.replace(/^%/, ""), node = nodes.get(name);
    // Ops are called as the first node of their kind: such words stay words.
    if (!node || !(word.startsWith("%") || /\d$/.test(word))) return word;
    const made = button(word, () => choose({node: name}));
    made.title = node.module_path;
    return made;
  });
}

// What is selected and shown: {kernel, node, module, view, find}. It stands in the address.
const VIEWS = ["graph", "kernels", "modules", "roofline", "refusals"];
const state = {kernel: "", node: "", module: "", view: "graph", find: ""};
const listeners = [];
function choose(change) {
  if ("kernel" in change) change = {node: "", ...change};
  if (change.node) change = {...change, kernel: nodes.get(change.node).place};
  Object.assign(state, change);
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries(state))
    if (value && !(key === "view" && value === "graph") && !(key === "kernel" && state.node))
      words.set(key, value);
  history.replaceState(null, "", `#${words}`);
  for (const listener of listeners) listener(change);
}
function follow() {
  const words = new URLSearchParams(location.hash.slice(1));
  const wanted = {kernel: "", node: "", module: "", view: "graph", find: ""};
  for (const key of Object.keys(wanted)) wanted[key] = words.get(key) || wanted[key];
  if (!places.has(wanted.kernel)) wanted.kernel = "";
  if (!nodes.has(wanted.node)) wanted.node = "";
  if (!levels.has(wanted.module) && wanted.module !== "*") wanted.module = "";
  if (!VIEWS.includes(wanted.view)) wanted.view = "graph";
  if (wanted.node) delete wanted.kernel;
  else delete wanted.node;
  choose(wanted);
}
