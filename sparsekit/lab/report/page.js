"use strict";
// The report's page. DATA is what sparsekit.report.report_data gives, and the probes. What stands before "the page" is
// pure. Tests run all of it against a small document of their own in Node, and in Chromium.

const FILTERS = ["model", "task", "tokens", "seed", "device"];
const DEPTH_BINS = 10;
// Okabe and Ito's colours, which colour-blind readers tell apart; shapes say the same a second time.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
const SECTIONS = [["middle", 1, "circle"], ["last", 0, "triangle-up"], ["streaming", 2, "square"]]; // colour, marker
const LEGEND = {
  showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { t: 48, r: 16, b: 56, l: 72 },
};
const MOST_LABELS = 45;
const LONGEST_LABEL = typeof innerWidth === "number" && innerWidth < 800 ? 20 : 60;

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const cellOf = (r) => [r.model, r.task, r.tokens, r.seed, r.device].join("\u0000");
const unique = (values) => [...new Set(values)];
const missing = (value) => value === null || value === undefined;

/** Records that pass: `filters` maps a field to the value wanted ("" for all), and `config` to a part of the label. */
function select(records, filters) {
  return records.filter(
    (r) =>
      FILTERS.every((name) => !filters[name] || String(r[name]) === filters[name]) &&
      (!filters.config || r.label === "dense" || r.label.toLowerCase().includes(filters.config.toLowerCase())),
  );
}

/** Of a record those of `names` in which `records` differ: within them, scores and times can be compared. */
function placing(records, names = ["model", "device"]) {
  const told = names.filter((name) => unique(records.map((r) => r[name])).length > 1);
  return (r) => told.map((name) => r[name]).join(", ");
}

/** Records by what `of` says of each, in order. */
function grouped(records, of) {
  const groups = new Map();
  for (const r of records) {
    const key = of(r);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(r);
  }
  return groups;
}

/** One point for each config and place that has every cell that any config has there; `lacking` counts the others. */
function byConfig(records) {
  const places = grouped(records, placing(records));
  const dense = new Map(records.filter((r) => r.config_key === "dense").map((r) => [cellOf(r), r]));
  const relative = [...places.values()].every((rows) => rows.some((r) => dense.has(cellOf(r))));
  const points = [];
  let lacking = 0;
  for (const [place, inPlace] of places) {
    const cells = unique(inPlace.map(cellOf));
    for (const [key, mine] of grouped(inPlace, (r) => r.config_key)) {
      const rows = [...new Map(mine.map((r) => [cellOf(r), r])).values()];
      if (rows.length < cells.length) {
        lacking += 1;
        continue;
      }
      const timed = rows.filter((r) => r.ttft_s && (!relative || dense.get(cellOf(r))?.ttft_s));
      const kls = rows.map((r) => r.kl).filter((kl) => !missing(kl));
      points.push({
        key,
        place,
        label: rows[0].label,
        score: mean(rows.map((r) => r.score)),
        density: mean(rows.map((r) => r.density)),
        time: timed.length
          ? mean(timed.map((r) => (relative ? r.ttft_s / dense.get(cellOf(r)).ttft_s : r.ttft_s)))
          : null,
        kl: kls.length ? mean(kls) : null,
        cells: rows.length,
      });
    }
  }
  return { points, lacking, relative };
}

/** The length at which most configs can be compared, the longest of such; "" if all lengths together compare as many. */
function startingLength(records) {
  let [best, most] = ["", byConfig(records).points.length];
  for (const tokens of unique(records.map((r) => r.tokens)).sort((a, b) => b - a)) {
    const compared = byConfig(records.filter((r) => r.tokens === tokens)).points.length;
    if (compared > most) [best, most] = [String(tokens), compared];
  }
  return best;
}

/** The points that no other beats: less of `field` and at least the score. In ascending order of `field`. */
function pareto(points, field) {
  const sorted = points.filter((p) => p[field] !== null).sort((a, b) => a[field] - b[field] || b.score - a.score);
  const front = [];
  for (const p of sorted) if (!front.length || p.score > front[front.length - 1].score) front.push(p);
  return front;
}

const hasDepths = (r) => r.depths.some((d) => d !== null);

/** Mean score by length and by depth bin of one config: {lengths, depths (middles), score and count[depth][length]}. */
function needleMap(records, key) {
  const mine = records.filter((r) => r.config_key === key && hasDepths(r));
  const lengths = unique(mine.map((r) => r.tokens)).sort((a, b) => a - b);
  const found = Array.from({ length: DEPTH_BINS }, () => lengths.map(() => []));
  for (const r of mine)
    r.depths.forEach((depth, i) => {
      if (depth !== null)
        found[Math.min(Math.floor(depth * DEPTH_BINS), DEPTH_BINS - 1)][lengths.indexOf(r.tokens)].push(r.scores[i]);
    });
  return {
    lengths,
    depths: found.map((_, i) => (i + 0.5) / DEPTH_BINS),
    score: found.map((row) => row.map((values) => (values.length ? mean(values) : null))),
    count: found.map((row) => row.map((values) => values.length)),
  };
}

/** Mean density of each layer, a row for each config and model, sparsest first: {labels, density[row][layer]}. */
function layerMap(records) {
  const place = placing(records, ["model"]);
  const of = (r) => `${r.config_key}\u0000${place(r)}`;
  const rows = [...grouped(records.filter((r) => r.layer_density), of).values()].map((mine) => ({
    label: [mine[0].label, place(mine[0])].filter(Boolean).join(", "),
    density: mine[0].layer_density.map((_, layer) => mean(mine.map((r) => r.layer_density[layer] ?? 1))),
  }));
  rows.sort((a, b) => mean(a.density) - mean(b.density));
  return { labels: rows.map((row) => row.label), density: rows.map((row) => row.density) };
}

/** Lines of two texts: [" " | "-" | "+", line], by their longest common subsequence. */
function diff(before, after) {
  const a = before.split("\n"), b = after.split("\n");
  const common = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const out = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) out.push([" ", a[i++]]), j++;
    else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) out.push(["-", a[i++]]);
    else out.push(["+", b[j++]]);
  }
  return out;
}

/** The records in order of a column; numbers by size, words by letter, what is missing last. */
function sorted(records, column, descending) {
  const sign = descending ? -1 : 1;
  return [...records].sort((a, b) => {
    const x = a[column], y = b[column];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

// ---- the page

const fixed = (digits) => (value) => value.toFixed(digits);
const plain = (value) => String(value);
const small = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(4));

// Field, heading, and of numbers how they are written.
const COLUMNS = [
  ["label", "config"], ["model", "model"], ["task", "task"], ["tokens", "tokens", plain], ["seed", "seed", plain],
  ["samples", "prompts", plain], ["score", "score", fixed(3)], ["score_low", "95% low", fixed(3)],
  ["score_high", "95% high", fixed(3)], ["kl", "KL", small], ["ttft_s", "first token, s", fixed(3)],
  ["ttft_s_p20", "p20", fixed(3)], ["ttft_s_p80", "p80", fixed(3)], ["density", "density", fixed(3)],
  ["tile_density", "tile density", fixed(3)], ["plan_ms", "plan, ms", fixed(2)],
  ["peak_memory_bytes", "peak, GB", (bytes) => (bytes / 1e9).toFixed(2)], ["device", "device"], ["dtype", "dtype"],
];
const OFTEN_CONSTANT = ["model", "seed", "samples", "device", "dtype"];
const MEANS = [
  ["label", "config"], ["place", "where"], ["score", "score", fixed(3)], ["time", "time", fixed(3)],
  ["density", "density", fixed(3)], ["kl", "KL", small], ["cells", "records", plain],
  ["fronts", "on the front of"],
];

const state = {
  filters: {}, needle: "", other: "", before: "", after: "", probe: "0",
  order: { table: ["score", true], configs: ["score", true] },
};
const at = (id) => document.getElementById(id);

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const number = (value) => (missing(value) ? "none" : small(value));
/** Text that Plotly, which reads some tags, shows as it is. */
const shown = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
const short = (text) =>
  text.length <= LONGEST_LABEL ? text : `${text.slice(0, LONGEST_LABEL / 2)}\u2026${text.slice(1 - LONGEST_LABEL / 2)}`;

function options(id, values, chosen, change) {
  const box = at(id);
  box.replaceChildren(
    ...values.map(([value, text]) => {
      const made = node("option", text, { value });
      if (value === chosen) made.setAttribute("selected", "selected");
      return made;
    }),
  );
  box.value = chosen;
  box.onchange = () => change(box.value);
}

/** Words in the place of something that has nothing to show. */
function words(id, text) {
  at(`${id}-words`).textContent = text;
  at(`${id}-words`).hidden = !text;
}

/** A plot, or, where there is nothing to draw, words that say why. */
function plotOrWords(id, traces, layout, nothing) {
  words(id, nothing);
  at(id).hidden = Boolean(nothing);
  if (!nothing) plot(id, traces, layout);
}

/** Margins are given, since Plotly takes long to find its own: `automargin` where labels may be of any length. */
function plot(id, traces, { xaxis, yaxis, ...layout }) {
  const axis = { gridcolor: "#e4e7eb", zeroline: false, ticks: "outside", tickcolor: "#cbd2d9" };
  const titled = ({ title, ...more }) => ({ ...axis, ...more, title: { text: title, standoff: 10 } });
  const font = { family: "system-ui, sans-serif", size: 12, color: "#1f2933" };
  const margin = { t: 12, r: 16, b: 56, l: 72 };
  Plotly.react(
    at(id),
    traces,
    { margin, height: 400, font, hovermode: "closest", ...layout, xaxis: titled(xaxis), yaxis: titled(yaxis) },
    { displayModeBar: false, responsive: true },
  );
}

/** From a little below the least to a little above the most. */
function around(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const room = most > least ? Math.max(0.07 * (most - least), 0.005) : 0.1;
  return [least - room, most + room];
}

function drawPareto(id, summary, field, title) {
  const isDense = (p) => p.key === "dense"; // drawn last, on top, and not the sample that a legend shows
  const points = summary.points.filter((p) => p[field] !== null).sort((a, b) => isDense(a) - isDense(b));
  const traces = [];
  [...grouped(points, (p) => p.place)].forEach(([place, mine], i) => {
    const colour = COLOURS[i % COLOURS.length];
    const front = pareto(mine, field);
    const mark = (p) => (isDense(p) ? "diamond" : "circle") + (front.includes(p) ? "" : "-open");
    const hover = mine.map(
      (p) => `${shown([p.label, place].filter(Boolean).join(", "))}<br>score ${number(p.score)}<br>` +
        `${title}: ${number(p[field])}` + (field === "density" ? "" : `<br>density ${number(p.density)}`) +
        (p.kl === null ? "" : `<br>KL ${number(p.kl)}`),
    );
    traces.push(
      { x: front.map((p) => p[field]), y: front.map((p) => p.score), mode: "lines", hoverinfo: "skip",
        showlegend: false, line: { color: colour, shape: "hv", width: 1.5 } },
      { x: mine.map((p) => p[field]), y: mine.map((p) => p.score), text: hover, hoverinfo: "text", mode: "markers",
        name: shown(place), customdata: mine.map((p) => p.key),
        marker: { size: mine.map((p) => (isDense(p) ? 12 : mine.length > 100 ? 6 : 9)),
          symbol: mine.map(mark), color: colour, opacity: 1, line: { width: 1.5, color: colour } } },
    );
  });
  plotOrWords(
    id,
    traces,
    { xaxis: { title, range: around(points.map((p) => p[field])) },
      yaxis: { title: "mean score", range: around(points.map((p) => p.score)) },
      ...(traces.length > 2 ? LEGEND : { showlegend: false }) },
    points.length ? "" : summary.points.length ? "No task of this choice was timed." : whyNothing(summary),
  );
  if (points.length && !at(id).listens) {
    at(id).listens = true;
    at(id).on("plotly_click", ({ points: [clicked] }) => {
      if (!clicked.customdata) return;
      state.needle = state.after = clicked.customdata;
      at("after").value = state.after;
      drawDiff();
      draw();
    });
  }
}

function whyNothing(summary) {
  return summary.lacking
    ? "No config has a record for every task, length and seed of this choice: narrow the filters to compare fewer."
    : "No record passes these filters.";
}

/** Two needle maps, of configs that the reader chooses: at first the best that is not dense, and dense. */
function drawNeedles(records, summary) {
  const keys = unique(records.filter(hasDepths).map((r) => r.config_key));
  const best = [...summary.points].sort((a, b) => b.score - a.score).map((p) => p.key);
  const first = [...best, ...keys].find((key) => key !== "dense" && keys.includes(key)) ?? keys[0] ?? "";
  const second = keys.includes("dense") ? "dense" : keys.find((key) => key !== first) ?? "";
  for (const [id, fallback] of [["needle", first], ["other", second]]) {
    if (!keys.includes(state[id])) state[id] = fallback;
    drawNeedle(id, keys, records);
  }
}

function drawNeedle(id, keys, records) {
  at(id).hidden = !keys.length;
  options(id, keys.map((key) => [key, DATA.configs[key].label]), state[id], (key) => {
    state[id] = key;
    drawNeedle(id, keys, records);
  });
  const heat = needleMap(records, state[id]);
  const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1];
  plotOrWords(
    `${id}-map`,
    [{ type: "heatmap", x: heat.lengths.map(String), y: heat.depths, z: heat.score, zmin: 0, zmax: 1,
      colorscale: "Cividis", hoverongaps: false, xgap: 1, ygap: 1, customdata: heat.count,
      texttemplate: heat.lengths.length <= 8 ? "%{z:.2f}" : "",
      hovertemplate: "%{x} tokens, depth %{y:.0%}<br>score %{z:.3f} of %{customdata} prompts<extra></extra>",
      colorbar: { title: { text: "score", side: "right" }, thickness: 12 } }],
    { margin: { t: 12, r: 80, b: 56, l: 72 },
      xaxis: { title: "tokens of the prompt", type: "category", showgrid: false },
      yaxis: { title: "depth of the answer", range: [1, 0], showgrid: false, tickvals: ticks,
        ticktext: ticks.map((depth) => `${Math.round(100 * depth)}%`) } },
    state[id] ? "" : keys.length ? "There is no other config."
      : records.length ? "No record of this choice tells where its answers stand: passkey and needle tasks do."
      : whyNothing({ lacking: 0 }),
  );
}

function drawLayers(records) {
  const { labels, density } = layerMap(records);
  const rows = labels.map((_, i) => i);
  const step = Math.ceil(labels.length / MOST_LABELS);
  const told = rows.filter((i) => i % step === 0);
  plotOrWords(
    "layer-map",
    [{ type: "heatmap", x: [...Array(Math.max(0, ...density.map((row) => row.length))).keys()], y: rows, z: density,
      zmin: 0, zmax: 1, colorscale: "Cividis", hoverongaps: false, ygap: labels.length > MOST_LABELS ? 0 : 1,
      text: density.map((row, i) => row.map(() => shown(labels[i]))),
      hovertemplate: "%{text}<br>layer %{x}: density %{z:.3f}<extra></extra>",
      colorbar: { title: { text: "density", side: "right" }, thickness: 12 } }],
    { height: Math.max(240, 90 + 15 * Math.min(labels.length, MOST_LABELS)), margin: { t: 12, r: 80, b: 56, l: 72 },
      xaxis: { title: "layer", showgrid: false, tickformat: "d" },
      yaxis: { title: "", automargin: true, autorange: "reversed", showgrid: false, tickvals: told,
        ticktext: told.map((i) => shown(short(labels[i]))) } },
    labels.length ? "" : records.length ? "Only dense attention here: every layer has 1." : whyNothing({ lacking: 0 }),
  );
}

/** The probe that is chosen among those of the model that is chosen. */
function drawProbe() {
  const model = state.filters.model;
  const known = DATA.probes.map((p, i) => [String(i), p]).filter(([, p]) => !model || p.model === model);
  if (!known.some(([i]) => i === state.probe)) state.probe = known[0]?.[0] ?? "0";
  at("probe").hidden = known.length < 2;
  options("probe", known.map(([i, p]) => [i, `${p.model}, ${p.file}`]), state.probe, (i) => {
    state.probe = i;
    drawProbe();
  });
  const nothing = known.length ? "" : DATA.probes.length
    ? `There is no probe of ${model} here.`
    : "No probe was given: `sparsekit calibrate probe MODEL -o probe.json` makes one, to be named beside the results.";
  words("probe", nothing);
  for (const id of ["probe-says", "probe-gradient", "probe-mass"]) at(id).hidden = Boolean(nothing);
  if (nothing) return;
  const probe = DATA.probes[Number(state.probe)];
  at("probe-says").textContent = probe.says;
  drawSections("probe-gradient", probe, probe.gradient, "gradient |dy/d\u03b8|, mean over pairs", probe.gradient_error);
  drawSections("probe-mass", probe, probe.mass, "attention weight, mean over pairs", null);
}

function drawSections(id, probe, found, title, errors) {
  const traces = SECTIONS.map(([name, colour, symbol]) => ({
    x: probe.layers, y: found[name], name, mode: "lines+markers",
    visible: name === "streaming" ? "legendonly" : true, // many times the others
    line: { color: COLOURS[colour], width: 1.5 }, marker: { symbol, size: 7, color: COLOURS[colour] },
    error_y: errors ? { type: "data", array: errors[name], thickness: 1, width: 2 } : { visible: false },
    hovertemplate: `layer %{x}, ${name}: %{y:.3g}<extra></extra>`,
  }));
  plot(
    id,
    traces,
    { xaxis: { title: "layer", tickformat: "d", range: [probe.layers[0] - 0.5, probe.layers.at(-1) + 0.5] },
      yaxis: { title, rangemode: "tozero", exponentformat: "power", showexponent: "all" }, ...LEGEND },
  );
}

function drawDiff() {
  const text = (key) => DATA.configs[key]?.text ?? "";
  const found = diff(text(state.before), text(state.after));
  const same = found.every(([mark]) => mark === " ");
  at("diff").replaceChildren(
    ...(same ? [node("div", "The two run the same:", { class: "same" })] : []),
    ...found.map(([mark, line]) =>
      node("div", `${mark} ${line}`, { class: { " ": "same", "-": "less", "+": "more" }[mark] }),
    ),
  );
}

/** Rows in the order that the reader chose for this table. */
function drawTable(id, columns, rows) {
  const [by, descending] = state.order[id];
  const head = node("tr", null);
  for (const [column, title, written] of columns) {
    const arrow = by === column ? (descending ? " \u25be" : " \u25b4") : "";
    const cell = node("th", title + arrow, { "data-column": column, class: written ? "number" : "word" });
    cell.onclick = () => {
      state.order[id] = [column, by === column ? !descending : true];
      drawTable(id, columns, rows);
    };
    head.append(cell);
  }
  const body = sorted(rows, by, descending).map((r) => {
    const row = node("tr", null);
    row.append(
      ...columns.map(([column, , written]) => {
        const value = r[column];
        const text = missing(value) ? "" : written && typeof value === "number" ? written(value) : String(value);
        return node("td", text, { class: written ? "number" : "word" });
      }),
    );
    return row;
  });
  at(id).replaceChildren(head, ...body);
}

function drawMeans(summary, time) {
  const fronts = new Map();
  for (const [field, name] of [["time", "time"], ["density", "density"]])
    for (const mine of grouped(summary.points, (p) => p.place).values())
      for (const p of pareto(mine, field)) fronts.set(p, [...(fronts.get(p) ?? []), name]);
  const rows = summary.points.map((p) => ({ ...p, fronts: fronts.get(p)?.join(", ") }));
  const columns = MEANS.filter(([column]) => column !== "place" || rows.some((row) => row.place));
  words("configs", rows.length ? "" : whyNothing(summary));
  const called = ([column, title, written]) => [column, column === "time" ? time : title, written];
  drawTable("configs", columns.map(called), rows);
}

/** The columns that tell records apart, and a sentence of the others. */
function drawRecords(records) {
  const constant = OFTEN_CONSTANT.filter((name) => unique(DATA.records.map((r) => r[name])).length === 1);
  const said = COLUMNS.filter(([column]) => constant.includes(column) && !missing(DATA.records[0][column]));
  const same = said.map(([column, title]) => `${title} ${DATA.records[0][column]}`).join(", ");
  at("constant").textContent = "A click on a heading sorts." + (same && ` The same in all: ${same}.`);
  drawTable("table", COLUMNS.filter(([column]) => !constant.includes(column)), records);
}

function draw() {
  const records = select(DATA.records, state.filters);
  const summary = byConfig(records);
  const configs = unique(records.map((r) => r.config_key)).length;
  const lacking = `; ${summary.lacking} lack${summary.lacking === 1 ? "s" : ""} some task, length or seed of these: narrow the choice to see their means`;
  at("count").textContent =
    `${records.length} of ${DATA.records.length} records, ${configs} config${configs === 1 ? "" : "s"}` +
    (summary.lacking ? lacking : "");
  const time = summary.relative ? "time to first token (dense: 1)" : "time to first token, s";
  drawPareto("score-time", summary, "time", time);
  drawPareto("score-density", summary, "density", "density");
  drawNeedles(records, summary);
  drawLayers(records);
  drawProbe();
  drawMeans(summary, summary.relative ? "time of dense" : "first token, s");
  drawRecords(records);
  at("page").setAttribute("data-ready", String(records.length));
}

function readHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of [...FILTERS, "config"]) {
    state.filters[name] = said.get(name) ?? "";
    at(`filter-${name}`).value = state.filters[name];
  }
}

function filtered(changes) {
  Object.assign(state.filters, changes);
  for (const [name, value] of Object.entries(changes)) at(`filter-${name}`).value = value;
  const said = Object.entries(state.filters).filter(([, chosen]) => chosen);
  history.replaceState(null, "", "#" + new URLSearchParams(said));
  draw();
}

function start() {
  for (const name of FILTERS) {
    const values = unique(DATA.records.map((r) => r[name])).sort((a, b) => (typeof a === "number" ? a - b : 0));
    const choices = [["", `all (${values.length})`], ...values.map((value) => [String(value), String(value)])];
    options(`filter-${name}`, choices, "", (value) => filtered({ [name]: value }));
  }
  at("filter-config").oninput = () => filtered({ config: at("filter-config").value });
  at("reset").onclick = () => filtered(Object.fromEntries([...FILTERS, "config"].map((name) => [name, ""])));
  readHash();
  if (!location.href.includes("#")) at("filter-tokens").value = state.filters.tokens = startingLength(DATA.records);
  at("timed").hidden = !DATA.records.some((r) => r.ttft_s);
  addEventListener("hashchange", () => {
    readHash();
    draw();
  });
  const keys = Object.keys(DATA.configs);
  const best = byConfig(DATA.records).points.sort((a, b) => b.score - a.score).find((p) => p.key !== "dense")?.key;
  state.before = "dense" in DATA.configs ? "dense" : keys[0] ?? "";
  state.after = best ?? keys.find((key) => key !== state.before) ?? state.before;
  for (const side of ["before", "after"])
    options(side, keys.map((key) => [key, DATA.configs[key].label]), state[side], (key) => {
      state[side] = key;
      drawDiff();
    });
  drawDiff();
  const told = (f) => `${f.label}, ${f.task} at ${f.tokens}: ${f.error}`;
  at("failed").replaceChildren(...DATA.failed.map((f) => node("li", told(f))));
  at("failures").hidden = !DATA.failed.length;
  at("results").hidden = at("details").hidden = !DATA.records.length;
  at("gradients").hidden = !DATA.records.length && !DATA.probes.length;
  draw();
}

if (typeof module !== "undefined") module.exports = { select, byConfig, startingLength, pareto, needleMap, layerMap, diff, sorted };
if (typeof document !== "undefined") start();
