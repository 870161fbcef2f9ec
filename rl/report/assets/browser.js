// The browser of completions: filtered and ordered in memory, a page at a time in the document.
const PAGE = 20;
const controls = Object.fromEntries(
  ["by-source", "by-verdict", "by-least", "by-most", "by-text", "by-order"].map((id) => [id.slice(3), document.getElementById(id)]),
);
const completions = DATA.sources.flatMap((source, from) => source.rows.map((row) => ({ ...row, from })));
let matches = [], page = 0;

if (completions.length) start();

function start() {
  const total = DATA.sources.reduce((sum, source) => sum + source.total, 0);
  document.getElementById("browser-about").append(
    ...(completions.length === total
      ? [`All ${total.toLocaleString("en")} completions.`]
      : [
          `${completions.length.toLocaleString("en")} of ${total.toLocaleString("en")} completions, spread over the steps; `,
          "rare verdicts are shown more often than they occur. ",
          element("code", {}, "python -m rl samples RUN_DIR"),
          " lists all.",
        ]),
  );
  DATA.sources.forEach((source, i) => {
    if (source.rows.length) controls.source.append(element("option", { value: i }, `${label(source)} (${source.rows.length})`));
  });
  const verdicts = new Map();
  for (const { verdict } of completions) verdicts.set(verdict, (verdicts.get(verdict) ?? 0) + 1);
  for (const [verdict, count] of verdicts) {
    controls.verdict.append(element("option", { value: verdict ?? "none" }, `${verdict ?? "no verdict"} (${count})`));
  }
  const form = document.getElementById("filters");
  form.addEventListener("input", () => search());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(search)); // after the controls have been emptied
  document.getElementById("page-before").addEventListener("click", () => turn(-1));
  document.getElementById("page-next").addEventListener("click", () => turn(1));
  search();
}

function label(source) {
  return source.run ? `${source.run}: ${source.name}` : source.name;
}

function search() {
  const text = controls.text.value.toLowerCase();
  const least = controls.least.value === "" ? null : Number(controls.least.value);
  const most = controls.most.value === "" ? null : Number(controls.most.value);
  const [key, direction] = controls.order.value.split(" ");
  matches = completions.filter(
    (row) =>
      (controls.source.value === "" || row.from === Number(controls.source.value)) &&
      (controls.verdict.value === "" || (row.verdict ?? "none") === controls.verdict.value) &&
      (least === null || (row.reward !== null && row.reward >= least)) &&
      (most === null || (row.reward !== null && row.reward <= most)) &&
      (text === "" || [row.prompt, row.completion, row.answer, row.id].some((part) => part.toLowerCase().includes(text))),
  );
  const sign = direction === "asc" ? 1 : -1;
  matches.sort((a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null); // without a value: last
    return sign * (a[key] - b[key]);
  });
  page = 0;
  document.getElementById("browser-count").textContent = `${matches.length} of ${completions.length} completions match`;
  render();
}

function turn(by) {
  const pages = Math.ceil(matches.length / PAGE);
  if (page + by < 0 || page + by >= pages) return;
  page += by;
  render();
}

function render() {
  const pages = Math.max(1, Math.ceil(matches.length / PAGE));
  document.getElementById("browser-list").replaceChildren(...matches.slice(page * PAGE, (page + 1) * PAGE).map(item));
  document.getElementById("page-now").textContent = `page ${page + 1} of ${pages}`;
  // Not `disabled`: that would take the focus away from someone who pages by keyboard.
  document.getElementById("page-before").setAttribute("aria-disabled", String(page === 0));
  document.getElementById("page-next").setAttribute("aria-disabled", String(page >= pages - 1));
}

function item(row) {
  const summary = element(
    "summary",
    {},
    element("span", { class: `verdict ${row.verdict ?? ""}` }, row.verdict ?? "no verdict"),
    element("span", {}, element("span", { class: "label" }, "reward "), shown(row.reward)),
    element("span", {}, shown(row.tokens), element("span", { class: "label" }, row.finish === "length" ? " tokens, cut" : " tokens")),
    element("span", {}, element("span", { class: "label" }, "step "), shown(row.step)),
    element("span", { class: "excerpt", dir: "auto" }, row.completion.slice(-300).replace(/\s+/g, " ").trim()),
  );
  const details = element("details", {}, summary);
  details.addEventListener("toggle", () => {
    if (details.childElementCount === 1) details.append(opened(row));
  });
  return element("li", {}, details);
}

function opened(row) {
  const source = DATA.sources[row.from];
  const parts = Object.entries(row.components).map(([name, value]) => `${name} ${shown(value)}`);
  const facts = [
    ["gold answer", row.answer],
    ["components", parts.join(", ")],
    ["advantage", source.name === "training" ? shown(row.advantage) : ""],
    ["finish", row.finish === "length" ? "length: cut off at the limit" : row.finish],
    ["from", label(source)],
    ["problem", `${row.id}, group ${row.group}`],
  ].filter(([, value]) => value);
  return element(
    "div",
    { class: "sample" },
    element("dl", { class: "facts" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", { dir: "auto" }, value)))),
    element("h4", {}, "Prompt"),
    text(row.prompt, "Prompt"),
    element("h4", {}, "Completion"),
    text(row.completion, "Completion"),
  );
}

// Scrolls if long, so the keyboard must reach it.
function text(content, name) {
  return element("pre", { tabindex: "0", dir: "auto", role: "region", "aria-label": name }, content);
}
