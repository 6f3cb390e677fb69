"use strict";
// Runs the scripts of a report in Node, over a small document, and says what the page shows. Arguments: the page, and
// the address's part behind "#". Every element that the page's HTML names by an id exists, and no other.
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
  location: { hash: hash ? "#" + hash : "" },
  history: { replaceState: (...args) => (context.address = args[2]) },
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
    plots: Object.fromEntries(Object.entries(plots).map(([id, plot]) => [id, plot.traces])),
    diff: el("diff").children.map((line) => [line.attributes.class, line.textContent]),
    failed: el("failed").children.map((item) => item.textContent),
    failures_hidden: el("failures").hidden,
  };
}

const first = shown();
el("filter-task").onchange.call(null, (el("filter-task").value = "needle4"));
const filtered = { ...shown(), address: context.address };
el("filter-config").value = "64";
el("filter-config").oninput();
const searched = shown();
el("filter-config").value = "";
el("filter-config").oninput();
el("filter-task").onchange((el("filter-task").value = ""));
const heads = el("table").children[0].children;
heads.find((cell) => cell.attributes["data-column"] === "tokens").onclick();
const descending = shown().table;
el("table").children[0].children.find((cell) => cell.attributes["data-column"] === "tokens").onclick();
const ascending = shown().table;
el("after").onchange((el("after").value = Object.keys(vm.runInContext("DATA.configs", context)).at(-1)));
const compared = shown().diff;
process.stdout.write(JSON.stringify({ first, filtered, searched, descending, ascending, compared }));
