"use strict";
// The pairs come as [uid, p, evidence, flag, prompt, better, worse, rank, why], most suspect first;
// those with a `why` have full texts, the others previews.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const [UID, P, EVIDENCE, FLAG, PROMPT, BETTER, WORSE, RANK, WHY] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
const MARKS = ["right", "wrong", "unsure"];
const KEY = "softpref-audit-" + DATA.fingerprint;
const ALL = DATA.pairs.map((pair) => ({ pair, rank: pair[RANK] }));
const NOT_LISTED = DATA.total - ALL.length;
const SAMPLE = DATA.sample.map((index) => ALL[index]);
const get = (id) => document.getElementById(id);

const marks = remembered();
let view = "sample";
let shown = SAMPLE;
let page = 0;
let current = 0;
let sort = { by: "rank", down: false };

function remembered() {
  try {
    return new Map(Object.entries(JSON.parse(localStorage.getItem(KEY)) || {}));
  } catch {
    return new Map(); // no storage: marks last until the page is closed
  }
}

function remember() {
  try {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(marks)));
  } catch {
    get("advice").textContent = "Your browser cannot store marks: export them before you close this page.";
  }
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Mark the words of one text that are not in its longest common subsequence with the other.
function differing(mine, other) {
  const [a, b] = [mine.split(/(\s+)/), other.split(/(\s+)/)];
  if (a.length * b.length > 1e6) return [[mine, false]];
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  const words = [];
  let j = 0;
  for (let i = 0; i < a.length; i++) {
    while (j < b.length && a[i] !== b[j] && common[i * width + j + 1] > common[(i + 1) * width + j]) j++;
    const same = j < b.length && a[i] === b[j];
    words.push([a[i], !same]);
    if (same) j++;
  }
  return words;
}

function response(mine, other) {
  const parts = differing(mine, other).map(([word, differs]) =>
    differs && word.trim() ? element("mark", {}, word) : word);
  const made = element("div", { className: "text" });
  for (const part of parts) made.append(part); // one call has a limit on arguments
  return made;
}

function cell(name, className, ...children) {
  const made = element("td", { className }, ...children);
  made.dataset.name = name;
  return made;
}

function markButtons(pair) {
  const buttons = MARKS.map((mark) => {
    const button = element("button", { type: "button" }, mark);
    button.dataset.mark = mark;
    button.setAttribute("aria-pressed", marks.get(pair[UID]) === mark);
    button.addEventListener("click", () => setMark(pair, mark));
    return button;
  });
  return element("div", { className: "marks" }, ...buttons);
}

function setMark(pair, mark) {
  if (marks.get(pair[UID]) === mark) marks.delete(pair[UID]);
  else marks.set(pair[UID], mark);
  remember();
  render();
}

// The model's opinion would bias a reviewer, so the random sample does not show it.
function opinion({ pair, rank }) {
  if (view === "sample") return [];
  return [
    cell("rank", "number", String(rank)),
    cell("label right", "number", (100 * pair[P]).toFixed(1) + "%", element("div", { className: "quiet" }, pair[FLAG])),
    cell("evidence", "number", (pair[EVIDENCE] > 0 ? "+" : "") + pair[EVIDENCE].toFixed(2)),
  ];
}

function row(one, index) {
  const { pair } = one;
  const why = pair[WHY] && view === "all" ? [element("div", { className: "why" }, pair[WHY])] : [];
  const made = element("tr", {},
    ...opinion(one),
    cell("prompt", "", element("div", { className: "text prompt" }, pair[PROMPT]), ...why),
    cell("labelled better", "", response(pair[BETTER], pair[WORSE])),
    cell("labelled worse", "", response(pair[WORSE], pair[BETTER])),
    cell("your mark", "", markButtons(pair)));
  made.tabIndex = -1;
  if (index === current) made.setAttribute("aria-current", "true");
  made.addEventListener("click", () => select(index));
  return made;
}

function select(index) {
  const rows = get("rows").children;
  if (index < 0 || index >= rows.length) return;
  current = index;
  for (const [i, made] of [...rows].entries()) {
    if (i === index) made.setAttribute("aria-current", "true");
    else made.removeAttribute("aria-current");
  }
}

function filtered() {
  const words = get("search").value.toLowerCase();
  const flag = get("flag").value;
  const [low, high] = [Number(get("low").value), Number(get("high").value)];
  return ALL.filter(({ pair }) =>
    (!flag || pair[FLAG] === flag) && pair[P] >= low && pair[P] <= high &&
    (!words || [PROMPT, BETTER, WORSE].some((text) => pair[text].toLowerCase().includes(words))));
}

function choose() {
  shown = view === "sample" ? [...SAMPLE] : filtered();
  const key = { rank: (one) => one.rank, p: (one) => one.pair[P], evidence: (one) => one.pair[EVIDENCE] }[sort.by];
  if (view === "all") shown.sort((a, b) => (key(a) - key(b)) * (sort.down ? -1 : 1));
  page = 0;
  current = 0;
  render();
}

function count(pairs, mark) {
  return pairs.filter(({ pair }) => marks.get(pair[UID]) === mark).length;
}

function render() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  const from = page * PAGE;
  get("rows").replaceChildren(...shown.slice(from, from + PAGE).map(row));
  get("where").textContent = shown.length
    ? `${from + 1} to ${Math.min(from + PAGE, shown.length)} of ${shown.length.toLocaleString("en")} pairs`
    : "no matching pairs";
  get("back").disabled = page === 0;
  get("next").disabled = page >= pages - 1;
  const done = MARKS.map((mark) => `${count(SAMPLE, mark)} ${mark}`).join(", ");
  const sampling = view === "sample";
  get("advice").textContent = sampling
    ? `${SAMPLE.length} pairs drawn at random, without the model's opinion. Is the response labelled ` +
      `better really the better one? Marked so far: ${done}. The reviewed pairs are a clean set: export ` +
      "them and pass the file as --clean. Unsure pairs are dropped; wrong ones have their responses swapped."
    : "Apply your marks on these pairs to the cleaned data with --marks. They are not a clean set, because " +
      "suspects differ from other pairs." + (NOT_LISTED ? ` ${NOT_LISTED.toLocaleString("en")} less suspect ` +
      "pairs are only in labels.jsonl." : "");
  get("export").textContent = sampling ? "Export reviewed pairs (clean.jsonl)" : "Export marks (marks.jsonl)";
  get("filters").hidden = sampling;
  for (const button of document.querySelectorAll("[data-sort]")) button.parentElement.hidden = sampling;
}

function turn(by) {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  if (page + by < 0 || page + by >= pages) return;
  page += by;
  current = 0;
  render();
  get("pairs").scrollIntoView();
}

function save(name, rows) {
  const text = rows.map((one) => JSON.stringify(one) + "\n").join("");
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function exportMarks() {
  if (view === "all") {
    save("marks.jsonl", [...marks].map(([uid, mark]) => ({ uid, mark })));
    return;
  }
  const reviewed = SAMPLE.filter(({ pair }) => ["right", "wrong"].includes(marks.get(pair[UID])));
  save("clean.jsonl", reviewed.map(({ pair }) => {
    const [better, worse] = DATA.originals[pair[UID]].responses;
    const turned = marks.get(pair[UID]) === "wrong";
    return {
      prompt: DATA.originals[pair[UID]].prompt,
      chosen: turned ? worse : better,
      rejected: turned ? better : worse,
    };
  }));
}

function show(name) {
  view = name;
  for (const other of ["sample", "all"]) get("tab-" + other).setAttribute("aria-selected", other === name);
  get("view").setAttribute("aria-labelledby", "tab-" + name);
  choose();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  const mark = MARKS[Number(event.key) - 1];
  const at = shown[page * PAGE + current];
  if (step) {
    select(current + step);
    get("rows").children[current]?.scrollIntoView({ block: "nearest" });
  } else if (event.key === "ArrowRight") turn(1);
  else if (event.key === "ArrowLeft") turn(-1);
  else if (event.key === "/") get("search").focus();
  else if (mark && at) setMark(at.pair, mark);
  else return;
  event.preventDefault();
}

get("tab-sample").addEventListener("click", () => show("sample"));
get("tab-all").addEventListener("click", () => show("all"));
get("back").addEventListener("click", () => turn(-1));
get("next").addEventListener("click", () => turn(1));
get("export").addEventListener("click", exportMarks);
get("forget").addEventListener("click", () => {
  if (!confirm("Delete every mark on this page?")) return;
  marks.clear();
  remember();
  render();
});
for (const id of ["search", "flag", "low", "high"]) get(id).addEventListener("input", choose);
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    sort = { by: button.dataset.sort, down: sort.by === button.dataset.sort && !sort.down };
    show("all");
  });
}
document.addEventListener("keydown", keys);
show("sample");
