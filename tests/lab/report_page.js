"use strict";
// Runs the scripts of a report in Node, over a small document, and says what the page shows. Arguments: the page, and
// the address's part from "#" on. Every element that the page's HTML names by an id exists, and no other.
const fs = require("fs");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf8");
const hash = process.argv[3] ?? "";

class Element {
  constructor(tag) {
    this.tag = tag;
    this.attributes = {};
    this.children = [];
    this.textContent = "";
    this.value = "";
    this.hidden = false;
    this.listeners = {};
  }
  on(event, listener) {
    this.listeners[event] = listener;
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
  }
  append(...nodes) {
    this.children.push(...nodes);
  }
  replaceChildren(...nodes) {
    this.children = nodes;
  }
}

const body = page.replace(/<script>[\s\S]*?<\/script>/g, "");
const elements = new Map([...body.matchAll(/ id="([\w-]+)"/g)].map((match) => [match[1], new Element("?")]));
const plots = {};
const context = vm.createContext({
  document: {
    getElementById: (id) => {
      if (!elements.has(id)) throw new Error(`no element ${id}`);
      return elements.get(id);
    },
    createElement: (tag) => new Element(tag),
  },
  location: { href: "file:///report.html" + hash, hash: hash === "#" ? "" : hash }, // as browsers say it
  history: { replaceState: (...args) => (context.address = context.location.hash = args[2]) },
  addEventListener: (event, listener) => (context[`on${event}`] = listener),
  URLSearchParams,
  Plotly: {
    react: (box, traces, layout) => {
      const id = [...elements].find(([, element]) => element === box)[0];
      plots[id] = { traces, layout };
    },
  },
  console,
});
const scripts = [...page.matchAll(/<script>([\s\S]*?)<\/script>/g)].map((match) => match[1]);
if (scripts.length !== 3) throw new Error(`${scripts.length} scripts`);
new vm.Script(scripts[0]); // Plotly itself: whole, as far as its syntax tells
for (const script of scripts.slice(1)) vm.runInContext(script, context);

const el = (id) => elements.get(id);
function shown() {
  const rows = el("table").children;
  return {
    ready: el("page").attributes["data-ready"],
    count: el("count").textContent,
    table: rows.map((row) => row.children.map((cell) => cell.textContent)),
    options: Object.fromEntries(
      [...elements].filter(([id]) => id.startsWith("filter-")).map(([id, e]) => [id, e.children.map((c) => c.textContent)]),
    ),
    // A plot that is hidden is not shown, whatever it was before.
    plots: Object.fromEntries(Object.entries(plots).filter(([id]) => !el(id).hidden).map(([id, p]) => [id, p.traces])),
    axes: Object.fromEntries(Object.entries(plots).map(([id, { layout }]) => [id, [layout.xaxis, layout.yaxis]])),
    words: Object.fromEntries(
      [...elements].filter(([id, e]) => id.endsWith("-words") && !e.hidden).map(([id, e]) => [id, e.textContent]),
    ),
    configs: el("configs").children.map((row) => row.children.map((cell) => cell.textContent)),
    chosen: Object.fromEntries(["needle", "other", "before", "after"].map((id) => [id, el(id).value])),
    constant: el("constant").textContent,
    probe: el("probe-says").hidden ? null : el("probe-says").textContent,
    hidden: ["results", "details", "gradients", "timed"].filter((id) => el(id).hidden),
    diff: el("diff").children.map((line) => [line.attributes.class, line.textContent]),
    failed: el("failed").children.map((item) => item.textContent),
    failures_hidden: el("failures").hidden,
  };
}

const first = shown();
const steps = { first };
const rows = () => el("table").children.slice(1).length;
if (rows()) {
  el("filter-task").onchange.call(null, (el("filter-task").value = "needle4"));
  steps.filtered = { ...shown(), address: context.address };
  el("filter-config").value = "64";
  el("filter-config").oninput();
  steps.searched = shown();
  el("reset").onclick();
  steps.reset = { ...shown(), address: context.address };
  context.location.hash = "#task=vt";
  context.onhashchange();
  steps.moved = shown();
  el("reset").onclick();
  const head = (table, column) => el(table).children[0].children.find((c) => c.attributes["data-column"] === column);
  head("table", "tokens").onclick();
  steps.descending = shown().table;
  head("table", "tokens").onclick();
  steps.ascending = shown().table;
  head("configs", "density").onclick();
  steps.byDensity = shown().configs;
  const last = Object.keys(vm.runInContext("DATA.configs", context)).at(-1);
  el("after").onchange((el("after").value = last));
  steps.compared = shown().diff;
  el("before").onchange((el("before").value = last));
  steps.same = shown().diff;
  if (plots["score-time"]) {
    const [, points] = plots["score-time"].traces;
    el("score-time").listeners.plotly_click({ points: [{ customdata: points.customdata[0] }] });
    steps.clicked = { ...shown(), key: points.customdata[0] };
  }
}
process.stdout.write(JSON.stringify(steps));
