// The panel: what is selected, or the whole network where nothing is.
function table(rows) {
  const made = element("table");
  for (const row of rows) {
    const cells = row.map(cell => cell instanceof Node ? element("td", "", cell)
      : element("td", String(cell)));
    if (row.length > 2) for (const cell of cells.slice(1)) cell.className = "number";
    made.append(element("tr", "", ...cells));
  }
  return made;
}
function section(title, ...inside) {
  return inside.length ? [element("h3", title), ...inside] : [];
}
function list(title, items) {
  return items.length ? section(title, element("ul", "", ...items.map(item =>
    element("li", "", ...[item].flat())))) : [];
}
function copied(text) {
  const made = button("copy", async () => {
    // The clipboard of a page that was opened as a file may be closed: then by selection.
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = element("textarea", text);
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    made.textContent = "copied";
    setTimeout(() => made.textContent = "copy", 1500);
  }, "copy");
  return made;
}
function compared(alone, now) {
  const rows = [["", "alone", "planned"], ["launches", alone.launches, now.launches],
    ["moves", size(alone.bytes), size(now.bytes)]];
  if (timed) rows.push(["modelled", us(alone.us), us(now.us)]);
  return table(rows);
}
function refusedOf(items) {
  return items.map(r => [`${r.label || r.rule}: `, ...linked(r.reason)]);
}
function tellCode(place) {
  return ledger.code.filter(launch => launch.step === place.name).flatMap(launch => {
    const source = `${launch.own}\n${ledger.bodies[launch.shared]}`, r = launch.resources;
    const resources = r ? `${r.registers} registers per thread, ${r.spill_bytes} bytes spilled, `
      + `${size(r.shared_bytes)} of shared memory` : "";
    const code = element("details", "", element("summary", `Triton source of ${launch.name}`),
      copied(source), element("pre", source));
    return [...(resources ? [element("p", resources)] : []), code];
  });
}
function tellPlace(place) {
  const inside = place.nodes.map(name => nodes.get(name)), rows = [];
  if (place.what === "kernel") {
    if (timed) rows.push(["time", time(place.modelled)]);
    if (measured) rows.push([timed ? "" : "time", time(place.measured)]);
    rows.push([timed ? "share" : "share of bytes", percent(cost(place) / whole)],
      ["moves", size(place.size_bytes)], ["computes", flops(place.flops)]);
    if (timed && place.modelled.us) {
      rows.push(["", `${(place.flops / place.size_bytes || 0).toFixed(1)} FLOP per byte`],
        ["", `${(place.flops / place.modelled.us / 1e6).toFixed(1)} TFLOP/s modelled`]);
      if (place.bound) rows.push(["bound by", place.bound]);
    }
    rows.push(["launches", place.launches], ["configuration", place.config]);
  }
  const {alone, now} = change(inside);
  const code = place.what === "kernel" ? tellCode(place) : [];
  const refused = new Map(inside.flatMap(n => n.refused).map(r => [r.rule + r.reason, r]));
  return [element("h2", place.name), element("p", place.what === "kernel" ? place.module_path
    : `${place.what} ${place.module_path}`), element("p", place.computes), table(rows),
    ...(inside.length && place.what === "kernel" ? section("its ops", compared(alone, now)) : []),
    ...list("captured ops", inside.map(n => [button(n.op, () => choose({node: n.node})),
      ` ${n.module_path}`])),
    ...list("refused", refusedOf([...refused.values()])), ...section("code", ...code)];
}
function tellNode(node) {
  const kernel = places.get(node.place);
  const rows = [["kernel", places.has(node.kernel) ? button(node.kernel, () =>
    choose({kernel: node.kernel})) : node.kernel]];
  if (timed) rows.push(["alone", time(node.before)], ["its part now", time(node.after)]);
  if (timed && kernel.what === "kernel") rows.push(["its kernel", time(kernel.modelled)]);
  if (kernel.measured.us !== null) rows.push(["", time(kernel.measured)]);
  rows.push(["saves", `${size(node.bytes_saved)}, ${plural(node.kernels_saved, "launch")}`]);
  const heading = [element("h2", node.op), element("p", node.module_path || "(top module)"),
    element("p", `captured as ${node.node}`)];
  if (node.part_of) heading.push(element("p", `a part of ${node.part_of}`));
  return [...heading, table(rows), ...list("by", node.rules.map(named)),
    ...list("refused", refusedOf(node.refused))];
}
function tellAll() {
  const t = ledger.totals, costly = [...kernels].sort((a, b) => cost(b) - cost(a)).slice(0, 8);
  const rows = [["", "every op alone", "this plan"],
    ["launches", t.kernels_before, t.kernels_after],
    ["moved", size(t.bytes_before), size(t.bytes_after)]];
  if (timed) rows.push(["modelled", us(t.before.us), us(t.after.us)]);
  if (t.measured.us !== null) rows.push(["measured", "not measured", us(t.measured.us)]);
  if (t.torch_fallbacks) rows.push(["torch fallbacks", t.torch_fallbacks, t.torch_fallbacks]);
  const notes = [timed ? `Modelled times are for ${ledger.machine}.`
    : `The plan is for ${ledger.target}, which is not a GPU: no times are modelled.`];
  notes.push(ledger.measured_on ? `Measured on ${ledger.measured_on}.` : "Nothing was measured.");
  return [element("h2", "The whole network"), table(rows),
    ...notes.map(note => classed("dim", element("p", note))),
    ...list(timed ? "most time" : "most bytes", costly.map(kernel => [
      button(kernel.name, () => choose({kernel: kernel.name})),
      ` ${told(cost(kernel))}, ${percent(cost(kernel) / whole)}, ${kernel.module_path}`])),
    classed("dim", element("p", "Click a kernel or an op to see why it is as it is. Press ? for "
      + "the keys."))];
}
listeners.push(() => {
  const panel = at("panel");
  panel.replaceChildren(...(state.node ? tellNode(nodes.get(state.node))
    : state.kernel ? tellPlace(places.get(state.kernel)) : tellAll()));
  panel.scrollTop = 0;
});
