"use strict";
// The pairs come as [uid, p, evidence, flag, prompt, better, worse, rank, why], most suspect first.
// The most suspect pairs and the sample have full texts, the others previews without a `why`.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const MOSTLY_DIFFERENT = 0.6; // share of words; more marks than this would only make texts hard to read
const [UID, P, EVIDENCE, FLAG, PROMPT, BETTER, WORSE, RANK, WHY] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
const MARKS = ["right", "wrong", "unsure"];
const VIEWS = {
  sample: {
    heads: ["Prompt", "Response A", "Response B", "Which is better?"],
    choices: ["A", "B", "unsure"],
    keys: "1 A is better, 2 B is better, 3 unsure",
    reviewed: "reviewed",
    exported: "Export reviewed pairs (clean.jsonl)",
  },
  all: {
    heads: ["Prompt", "Labelled better", "Labelled worse", "Your mark"],
    choices: MARKS,
    keys: "1 the label is right, 2 wrong, 3 unsure",
    reviewed: "marked",
    exported: "Export marks (marks.jsonl)",
  },
};
const NO_FILTER = { search: "", flag: "", low: "0", high: "1" };
const KEY = "softpref-audit-" + DATA.fingerprint;
const ALL = DATA.pairs.map((pair) => ({ pair, rank: pair[RANK] }));
const NOT_LISTED = DATA.total - ALL.length;
const SAMPLE = DATA.sample.map((index) => ALL[index]);
const get = (id) => document.getElementById(id);
const markOf = ({ pair }) => marks.get(pair[UID]);

const marks = remembered();
const past = []; // what each mark of this visit replaced, for undo
let view = "sample";
let shown = SAMPLE;
let page = 0;
let current = 0; // index in `shown`
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
    get("unsaved").hidden = false;
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

function responses(first, second) {
  const both = [differing(first, second), differing(second, first)];
  const words = both.flat().filter(([word]) => word.trim());
  const share = words.filter(([, differs]) => differs).length / words.length;
  return both.map((parts) => {
    const made = element("div", { className: "text" });
    for (const [word, differs] of parts) // one call has a limit on arguments
      made.append(differs && word.trim() && share <= MOSTLY_DIFFERENT ? element("mark", {}, word) : word);
    return made;
  });
}

function cell(name, className, ...children) {
  const made = element("td", { className }, ...children);
  made.dataset.name = name;
  return made;
}

// The sample hides its labels before a mark, since a reviewer tends to agree with what is shown, and
// after it: whoever sees which marks agree learns what the labels favor, and marks the next pairs by it.
function isTurned(pair) {
  return view === "sample" && DATA.originals[pair[UID]].worse_first;
}

// The marks behind the keys 1, 2 and 3. They are always about the label, whatever the view.
function meanings(pair) {
  return isTurned(pair) ? ["wrong", "right", "unsure"] : MARKS;
}

function markButtons(at) {
  const { choices, heads } = VIEWS[view];
  const { pair } = shown[at];
  const buttons = meanings(pair).map((mark, i) => {
    const button = element("button", { type: "button" }, choices[i]);
    button.dataset.mark = choices[i]; // not the mark, whose color would show the label
    button.addEventListener("click", (event) => {
      event.stopPropagation(); // to the row, which would be selected
      setMark(at, mark);
    });
    return button;
  });
  const group = element("div", { className: "marks", role: "group" }, ...buttons);
  group.setAttribute("aria-label", `${heads[3]} Pair ${at + 1}`);
  return group;
}

function setMark(at, mark) {
  const before = markOf(shown[at]);
  past.push({ one: shown[at], before, view });
  put(shown[at], before === mark ? undefined : mark);
  go(before === mark ? at : nextUnmarked(at));
}

function put({ pair }, mark) {
  if (mark) marks.set(pair[UID], mark);
  else marks.delete(pair[UID]);
  remember();
}

function nextUnmarked(at) {
  const later = shown.findIndex((one, i) => i > at && !markOf(one));
  const first = later < 0 ? shown.findIndex((one) => !markOf(one)) : later;
  return first < 0 ? at : first;
}

function undo() {
  const last = past.pop();
  if (!last) return;
  put(last.one, last.before);
  if (view !== last.view || !shown.includes(last.one)) {
    for (const [id, value] of Object.entries(NO_FILTER)) get(id).value = value;
    show(last.view);
  }
  go(shown.indexOf(last.one));
}

const hasOpinion = () => view === "all" && DATA.speaks;

// The model's opinion would bias a reviewer, so the random sample does not show it.
function opinion({ pair, rank }) {
  if (!hasOpinion()) return [];
  return [
    cell("Rank", "number", String(rank)),
    cell("Label right", "number", (100 * pair[P]).toFixed(1) + "%", element("div", { className: "quiet" }, pair[FLAG])),
    cell("Evidence", "number", (pair[EVIDENCE] > 0 ? "+" : "") + pair[EVIDENCE].toFixed(2)),
  ];
}

function row(one, at) {
  const { pair } = one;
  const { heads } = VIEWS[view];
  const why = pair[WHY] && view === "all" ? [element("div", { className: "why" }, pair[WHY])] : [];
  const texts = responses(pair[BETTER], pair[WORSE]);
  if (isTurned(pair)) texts.reverse();
  const made = element("tr", { tabIndex: -1 },
    ...opinion(one),
    cell(heads[0], "", element("div", { className: "text" }, pair[PROMPT]), ...why),
    cell(heads[1], "", texts[0]),
    cell(heads[2], "", texts[1]),
    cell(heads[3], "", markButtons(at)));
  made.addEventListener("click", () => select(at));
  return made;
}

// Select a pair, on whatever page it is.
function select(at) {
  if (at < 0 || at >= shown.length) return;
  const to = Math.floor(at / PAGE);
  current = at;
  if (to === page) return refresh();
  page = to;
  draw();
}

function go(at) {
  select(at);
  const made = get("rows").children[current - page * PAGE];
  made?.focus({ preventScroll: true });
  made?.scrollIntoView({ block: "nearest" });
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
  shown = view === "sample" ? SAMPLE : filtered();
  const key = { rank: (one) => one.rank, p: (one) => one.pair[P], evidence: (one) => one.pair[EVIDENCE] }[sort.by];
  if (view === "all") shown.sort((a, b) => (key(a) - key(b)) * (sort.down ? -1 : 1));
  current = view === "sample" ? Math.max(0, nextUnmarked(-1)) : 0;
  page = Math.floor(current / PAGE);
  draw();
}

function draw() {
  const from = page * PAGE;
  const here = shown.slice(from, from + PAGE);
  get("rows").replaceChildren(...here.map((one, i) => row(one, from + i)));
  get("where").textContent = shown.length
    ? `${from + 1} to ${from + here.length} of ${shown.length.toLocaleString("en")} pairs`
    : "no matching pairs";
  get("back").disabled = page === 0;
  get("next").disabled = from + PAGE >= shown.length;
  refresh();
}

// Show marks and selection on the rows that are there.
function refresh() {
  for (const [i, made] of [...get("rows").children].entries()) {
    const one = shown[page * PAGE + i];
    made.ariaCurrent = page * PAGE + i === current ? "true" : null;
    const buttons = made.querySelectorAll("[data-mark]");
    for (const [place, mark] of meanings(one.pair).entries()) buttons[place].ariaPressed = String(markOf(one) === mark);
  }
  const marked = shown.filter(markOf).length.toLocaleString("en");
  get("progress").textContent = `${marked} of ${shown.length.toLocaleString("en")} ${VIEWS[view].reviewed}`;
  get("undo").disabled = !past.length;
}

function advice() {
  if (view === "sample")
    return `${SAMPLE.length} pairs drawn at random, without the model's opinion and without their labels: ` +
      "A and B stand in random order. Which is better? The reviewed pairs are a clean set: export them and pass " +
      "the file as --clean. The response that you found better becomes the chosen one; unsure pairs are dropped.";
  return "Apply your marks on these pairs to the cleaned data with --marks. " +
    (DATA.speaks ? "They are not a clean set, because suspects differ from other pairs. " : "") +
    (NOT_LISTED ? `${NOT_LISTED.toLocaleString("en")} ${DATA.speaks ? "less suspect" : "more"} pairs are only in labels.jsonl.` : "");
}

function turn(by) {
  const at = (page + by) * PAGE;
  if (at < 0 || at >= shown.length) return;
  select(at);
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
    const labels = new Map(ALL.map(({ pair }, i) => [pair[UID], DATA.labels[i]])); // what a mark is about
    save("marks.jsonl", [...marks].map(([uid, mark]) => ({ uid, mark, label: labels.get(uid) })));
    return;
  }
  const reviewed = SAMPLE.filter((one) => ["right", "wrong"].includes(markOf(one)));
  save("clean.jsonl", reviewed.map((one) => {
    const { prompt, responses: [better, worse] } = DATA.originals[one.pair[UID]];
    return markOf(one) === "wrong" ? { prompt, chosen: worse, rejected: better } : { prompt, chosen: better, rejected: worse };
  }));
}

function show(name) {
  view = name;
  for (const other of Object.keys(VIEWS)) get("tab-" + other).setAttribute("aria-selected", other === name);
  get("view").setAttribute("aria-labelledby", "tab-" + name);
  get("filters").hidden = get("slash").hidden = name === "sample";
  for (const made of document.querySelectorAll("[data-opinion]")) made.hidden = !hasOpinion();
  const heads = [...get("heads").children].slice(-4);
  for (const [i, text] of VIEWS[name].heads.entries()) heads[i].textContent = text;
  for (const button of document.querySelectorAll("[data-sort]")) {
    const order = sort.down ? "descending" : "ascending";
    button.parentElement.ariaSort = sort.by === button.dataset.sort ? order : "none";
  }
  get("advice").textContent = advice();
  get("keys").textContent = VIEWS[name].keys;
  get("export").textContent = VIEWS[name].exported;
  choose();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  const side = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const choice = ["1", "2", "3"].indexOf(event.key);
  if (step) go(current + step);
  else if (side && event.target.role === "tab") {
    const other = get(view === "sample" ? "tab-all" : "tab-sample");
    other.click();
    other.focus();
  } else if (side) turn(side);
  else if (event.key === "/" && view === "all") get("search").focus();
  else if (event.key === "Backspace") undo();
  else if (choice >= 0 && shown[current]) setMark(current, meanings(shown[current].pair)[choice]);
  else return;
  event.preventDefault();
}

if (!DATA.speaks) get("tab-all").textContent = "All pairs";
for (const name of Object.keys(VIEWS)) get("tab-" + name).addEventListener("click", () => show(name));
get("back").addEventListener("click", () => turn(-1));
get("next").addEventListener("click", () => turn(1));
get("undo").addEventListener("click", undo);
get("export").addEventListener("click", exportMarks);
get("forget").addEventListener("click", () => {
  if (!confirm("Delete every mark on this page?")) return;
  marks.clear();
  past.length = 0;
  remember();
  refresh();
});
for (const id of Object.keys(NO_FILTER)) get(id).addEventListener("input", choose);
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    sort = { by: button.dataset.sort, down: sort.by === button.dataset.sort && !sort.down };
    show("all");
  });
}
document.addEventListener("keydown", keys);
show("sample");
