"use strict";
// The report's page. DATA is what sparsekit.report.report_data gives. The functions up to `draw` are pure; tests run
// them, and the page itself against a small document of their own, in Node.

const FILTERS = ["model", "task", "tokens", "seed", "device"];
const DEPTH_BINS = 10;
const COLOURS = { dense: "#7b8794", config: "#2a78b8", frontier: "#d1495b" };

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const cellOf = (r) => [r.model, r.task, r.tokens, r.seed, r.device].join("\u0000");
const unique = (values) => [...new Set(values)];

/** Records that pass: `filters` maps a field to the value wanted ("" for all), and `config` to a part of the label. */
function select(records, filters) {
  return records.filter(
    (r) =>
      FILTERS.every((name) => !filters[name] || String(r[name]) === filters[name]) &&
      (!filters.config || r.label === "dense" || r.label.toLowerCase().includes(filters.config.toLowerCase())),
  );
}

/** One object for each config that has every cell that any config has; `lacking` counts the others. */
function byConfig(records) {
  const cells = unique(records.map(cellOf));
  const dense = new Map(records.filter((r) => r.config_key === "dense").map((r) => [cellOf(r), r]));
  const groups = new Map();
  for (const r of records) {
    if (!groups.has(r.config_key)) groups.set(r.config_key, new Map());
    groups.get(r.config_key).set(cellOf(r), r);
  }
  const relative = dense.size > 0;
  const points = [];
  let lacking = 0;
  for (const [key, mine] of groups) {
    if (mine.size < cells.length) {
      lacking += 1;
      continue;
    }
    const rows = [...mine.values()];
    const timed = rows.filter((r) => r.ttft_s && (!relative || dense.get(cellOf(r))?.ttft_s));
    const kls = rows.map((r) => r.kl).filter((kl) => kl !== null && kl !== undefined);
    points.push({
      key,
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
  return { points, lacking, relative };
}

/** The points that no other beats: less of `field` and at least the score. In ascending order of `field`. */
function pareto(points, field) {
  const sorted = points.filter((p) => p[field] !== null).sort((a, b) => a[field] - b[field] || b.score - a.score);
  const front = [];
  for (const p of sorted) if (!front.length || p.score > front[front.length - 1].score) front.push(p);
  return front;
}

/** Mean score by length and by depth bin of one config: {lengths, depths (middles), score[depth][length]}. */
function needleMap(records, key) {
  const mine = records.filter((r) => r.config_key === key && r.depths.some((d) => d !== null));
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
  };
}

/** Mean density of each layer, a row for each config that is not dense: {labels, density[config][layer]}. */
function layerMap(records) {
  const groups = new Map();
  for (const r of records)
    if (r.layer_density) {
      if (!groups.has(r.config_key)) groups.set(r.config_key, { label: r.label, rows: [] });
      groups.get(r.config_key).rows.push(r.layer_density);
    }
  const found = [...groups.values()];
  return {
    labels: found.map((g) => g.label),
    density: found.map((g) => g.rows[0].map((_, layer) => mean(g.rows.map((row) => row[layer] ?? 1)))),
  };
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
  const missing = (value) => value === null || value === undefined;
  return [...records].sort((a, b) => {
    const x = a[column], y = b[column];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

// ---- the page

const COLUMNS = [
  ["label", "config"], ["model", "model"], ["task", "task"], ["tokens", "tokens"], ["seed", "seed"],
  ["samples", "prompts"], ["score", "score"], ["score_low", "low"], ["score_high", "high"], ["kl", "KL"],
  ["ttft_s", "first token, s"], ["ttft_s_p20", "p20"], ["ttft_s_p80", "p80"], ["density", "density"],
  ["tile_density", "tile density"], ["plan_ms", "plan, ms"], ["peak_memory_bytes", "peak, bytes"], ["device", "device"],
];

const state = { filters: {}, sort: "score", descending: true, needle: "", before: "", after: "" };
const at = (id) => document.getElementById(id);

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(4);
}

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

function plot(id, traces, layout) {
  const style = { margin: { t: 10, r: 20, b: 50, l: 60 }, height: 380, font: { size: 12 }, ...layout };
  Plotly.react(at(id), traces, style, { displaylogo: false, responsive: true });
}

function drawPareto(id, summary, field, title) {
  const points = summary.points.filter((p) => p[field] !== null);
  const front = pareto(points, field);
  const hover = points.map(
    (p) => `${p.label}<br>score ${number(p.score)}, ${title} ${number(p[field])}<br>density ${number(p.density)}` +
      (p.kl === null ? "" : `, KL ${number(p.kl)}`),
  );
  plot(
    id,
    [
      { x: front.map((p) => p[field]), y: front.map((p) => p.score), mode: "lines", name: "Pareto front", hoverinfo: "skip",
        line: { color: COLOURS.frontier, shape: "hv", width: 1 } },
      { x: points.map((p) => p[field]), y: points.map((p) => p.score), text: hover, hoverinfo: "text", mode: "markers",
        name: "configs",
        marker: { size: 10, color: points.map((p) => (p.key === "dense" ? COLOURS.dense : COLOURS.config)) } },
    ],
    { xaxis: { title: { text: title } }, yaxis: { title: { text: "mean score" } }, showlegend: false },
  );
}

function drawHeat(id, x, y, z, xTitle, yTitle, layout = {}) {
  plot(
    id,
    [{ type: "heatmap", x, y, z, zmin: 0, zmax: 1, colorscale: "Viridis", hoverongaps: false }],
    { xaxis: { title: { text: xTitle }, type: "category" }, yaxis: { title: { text: yTitle }, automargin: true }, ...layout },
  );
}

function drawDiff() {
  const text = (key) => DATA.configs[key]?.text ?? "";
  at("diff").replaceChildren(
    ...diff(text(state.before), text(state.after)).map(([mark, line]) =>
      node("div", `${mark} ${line}`, { class: { " ": "same", "-": "less", "+": "more" }[mark] }),
    ),
  );
}

function drawTable(records) {
  const head = node("tr", null);
  for (const [column, title] of COLUMNS) {
    const arrow = state.sort === column ? (state.descending ? " \u25be" : " \u25b4") : "";
    const cell = node("th", title + arrow, { "data-column": column });
    cell.onclick = () => {
      state.descending = state.sort === column ? !state.descending : true;
      state.sort = column;
      drawTable(records);
    };
    head.append(cell);
  }
  const rows = sorted(records, state.sort, state.descending).map((r) => {
    const row = node("tr", null);
    row.append(...COLUMNS.map(([column]) => node("td", number(r[column]))));
    return row;
  });
  at("table").replaceChildren(head, ...rows);
}

function draw() {
  const records = select(DATA.records, state.filters);
  const summary = byConfig(records);
  at("count").textContent =
    `${records.length} of ${DATA.records.length} records, ${summary.points.length} configs` +
    (summary.lacking ? `; ${summary.lacking} lack some task or length of this choice and are left out of the two plots` : "");
  drawPareto("score-time", summary, "time", summary.relative ? "time to first token, of dense" : "time to first token, s");
  drawPareto("score-density", summary, "density", "density");
  const keys = unique(records.map((r) => r.config_key));
  if (!keys.includes(state.needle)) state.needle = keys[0] ?? "";
  options("needle", keys.map((key) => [key, DATA.configs[key].label]), state.needle, (key) => {
    state.needle = key;
    draw();
  });
  const heat = needleMap(records, state.needle);
  drawHeat("needle-map", heat.lengths.map(String), heat.depths, heat.score, "tokens", "depth of the answer", {
    yaxis: { title: { text: "depth of the answer" }, range: [1, 0] },
  });
  const layers = layerMap(records);
  const count = Math.max(0, ...layers.density.map((row) => row.length));
  drawHeat("layer-map", [...Array(count).keys()].map(String), layers.labels, layers.density, "layer", "", {
    height: 160 + 22 * layers.labels.length,
  });
  drawTable(records);
  at("page").setAttribute("data-ready", String(records.length));
}

function readHash() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of [...FILTERS, "config"]) state.filters[name] = said.get(name) ?? "";
}

function filtered(name, value) {
  state.filters[name] = value;
  const said = Object.entries(state.filters).filter(([, chosen]) => chosen);
  history.replaceState(null, "", "#" + new URLSearchParams(said));
  draw();
}

function start() {
  readHash();
  for (const name of FILTERS) {
    const values = unique(DATA.records.map((r) => r[name])).sort((a, b) => (typeof a === "number" ? a - b : 0));
    const choices = [["", `all (${values.length})`], ...values.map((value) => [String(value), String(value)])];
    options(`filter-${name}`, choices, state.filters[name], (value) => filtered(name, value));
  }
  at("filter-config").value = state.filters.config;
  at("filter-config").oninput = () => filtered("config", at("filter-config").value);
  const keys = Object.keys(DATA.configs);
  [state.before, state.after] = [keys[0], keys[1] ?? keys[0]];
  for (const side of ["before", "after"])
    options(side, keys.map((key) => [key, DATA.configs[key].label]), state[side], (key) => {
      state[side] = key;
      drawDiff();
    });
  drawDiff();
  at("failed").replaceChildren(...DATA.failed.map((f) => node("li", `${f.label}, ${f.task} at ${f.tokens}: ${f.error}`)));
  at("failures").hidden = !DATA.failed.length;
  draw();
}

if (typeof module !== "undefined") module.exports = { select, byConfig, pareto, needleMap, layerMap, diff, sorted };
if (typeof document !== "undefined") start();
