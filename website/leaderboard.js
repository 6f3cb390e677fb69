// The leaderboard's table: a click on a heading sorts, choices and words filter. Without a script it is a plain table.
(function () {
  const table = document.querySelector("#leaderboard table");
  if (!table) return;
  const headings = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const column = (name) => headings.findIndex((cell) => cell.textContent.trim() === name);
  const said = (row, index) => row.cells[index].textContent.trim();
  const asked = new URLSearchParams(location.search);

  // ---- filters

  const bar = document.createElement("div");
  bar.className = "leaderboard-filters";
  const choices = ["pattern", "model", "task", "tokens", "measured on"].map((name) => {
    const index = column(name);
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", name);
    choice.add(new Option("any " + (name === "measured on" ? "device" : name), ""));
    const values = new Set(rows.flatMap((row) => (name === "pattern" ? said(row, index).split(" + ") : [said(row, index)])));
    const numbers = [...values].every((value) => !isNaN(value));
    for (const value of [...values].sort((a, b) => (numbers ? a - b : a.localeCompare(b)))) choice.add(new Option(value));
    choice.value = values.has(asked.get(name)) ? asked.get(name) : "";
    choice.addEventListener("change", show);
    bar.append(choice);
    return { name, index, choice };
  });
  const words = document.createElement("input");
  words.type = "search";
  words.placeholder = "words of a setting";
  words.setAttribute("aria-label", "words of a setting");
  words.addEventListener("input", show);
  const count = document.createElement("span");
  count.setAttribute("role", "status");
  bar.append(words, count);
  document.getElementById("leaderboard").prepend(bar);

  function matches(row) {
    return (
      choices.every(({ name, index, choice }) => {
        const cell = said(row, index);
        return !choice.value || (name === "pattern" ? cell.split(" + ").includes(choice.value) : cell === choice.value);
      }) && words.value.toLowerCase().split(/\s+/).every((word) => row.textContent.toLowerCase().includes(word))
    );
  }

  function show() {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !matches(row);
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown + " of " + rows.length + " rows";
  }

  // ---- order

  function sort(index) {
    const up = headings[index].getAttribute("aria-sort") !== "ascending";
    for (const cell of headings) cell.removeAttribute("aria-sort");
    headings[index].setAttribute("aria-sort", up ? "ascending" : "descending");
    const texts = rows.filter((row) => said(row, index) !== "").map((row) => said(row, index));
    const numbers = texts.every((text) => !isNaN(parseFloat(text)));
    const key = (row) => (numbers ? parseFloat(said(row, index)) : said(row, index));
    rows.sort((a, b) => {
      const empty = (said(a, index) === "") - (said(b, index) === ""); // what was not measured comes last, both ways
      if (empty) return empty;
      const order = numbers ? key(a) - key(b) : key(a).localeCompare(key(b));
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }

  headings.forEach((cell, index) => {
    const button = document.createElement("button");
    button.append(...cell.childNodes);
    button.addEventListener("click", () => sort(index));
    cell.append(button);
  });
  show();
})();
