// The page of a blind comparison: shows the pair that the server names, and sends votes.
const GUARD = 200; // ms in which a new pair takes no vote: a key that bounces, a double click
const KEYS = { 1: "left", 2: "right", 0: "tie" };
let state = {};
let busy = false;
let shownAt = 0;

const byId = (id) => document.getElementById(id);

// Texts become text nodes, so no answer is ever parsed as HTML.
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function say(text) {
  byId("message").textContent = text;
  byId("message").classList.toggle("empty", text === ""); // a live region stays in the page
}

// Every answer of the server holds the whole state, and `error`, a sentence, if it refused.
async function send(path, body) {
  const post = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ pair: state.pair, ...body }),
  };
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch(path, body ? post : {});
    const told = await answer.json();
    say(told.error);
    show(told);
  } catch {
    say("The program does not answer. Is it still running in the terminal? No counted vote is lost.");
  }
  busy = false;
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function show(told) {
  const changed = told.judge !== state.judge || told.pair !== state.pair;
  state = told;
  byId("ask").hidden = told.judge !== null;
  byId("pair").hidden = byId("votes").hidden = told.judge === null || told.done;
  byId("end").hidden = !told.done;
  byId("judge").textContent = told.judge === null ? "" : `Judge: ${told.judge}`;
  byId("progress").hidden = told.judge === null;
  if (told.judge === null) return byId("name").focus();
  showProgress(told);
  if (told.done) return showEnd(told, changed);
  if (changed) showPair(told);
}

function showProgress({ voted, total, done }) {
  byId("bar").max = Math.max(total, 1);
  byId("bar").value = total ? voted : 1;
  byId("count").textContent = `${Math.min(voted + 1, total)} of ${total}`;
  if (done) byId("count").textContent = `${voted} of ${total}`;
  byId("undo").setAttribute("aria-disabled", String(voted === 0));
}

function showPair(told) {
  for (const name of ["instruction", "input", "left", "right"]) byId(name).textContent = told[name];
  byId("input-part").hidden = told.input === "";
  byId("note").value = told.note;
  byId("pair").setAttribute("aria-busy", "true");
  setTimeout(() => byId("pair").setAttribute("aria-busy", "false"), GUARD);
  shownAt = performance.now();
  if (document.activeElement === byId("note")) byId("note").blur();
  scrollTo(0, 0);
}

function showEnd({ voted, identical, seconds, result }, changed) {
  const same = identical ? `, and ${counted(identical, "pair")} with identical answers counted as a tie` : "";
  byId("end-text").textContent = `${counted(voted, "vote")} saved${same}.`;
  byId("end-help").textContent =
    `The program ends by itself in ${seconds} seconds and prints the result in the terminal. ` +
    "Until then you can undo the last vote, or see the result here; after that no vote can be changed.";
  byId("reopen").hidden = voted === 0;
  byId("end-help").hidden = byId("end-actions").hidden = result !== undefined;
  if (result) showResult(result);
  else if (changed) byId("end-title").focus();
}

function showResult({ title, columns, rows, lines }) {
  const row = (cells, tag, scope) =>
    element("tr", {}, ...cells.map((cell, at) => element(at ? tag : "th", at ? {} : { scope }, cell)));
  const head = element("tr", {}, ...columns.map((one) => element("th", { scope: "col" }, one)));
  const body = element("tbody", {}, ...rows.map((cells) => row(cells, "td", "row")));
  const table = element("table", {}, element("caption", {}, title), element("thead", {}, head), body);
  byId("result").replaceChildren(table, ...lines.map((line) => element("p", {}, line)));
  byId("result").hidden = false;
  byId("result").focus();
}

function vote(choice) {
  if (state.pair && performance.now() - shownAt > GUARD) send("/vote", { choice, note: byId("note").value });
}

async function undo() {
  if (state.voted > 0 && !state.result) await send("/undo", {});
}

async function reopen() {
  await undo();
  if (state.pair) byId("instruction-title").focus(); // the button is gone
}

function press(event) {
  const typing = event.target.matches("textarea, input[type=text]");
  if (event.key === "Escape" && typing) return event.target.blur();
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!byId("shortcuts").checked) return;
  if (event.key in KEYS) vote(KEYS[event.key]);
  else if (event.key.toLowerCase() === "u") undo();
  else if (event.key.toLowerCase() === "n" && state.pair) byId("note").focus();
  else return;
  event.preventDefault();
}

async function finish() {
  await send("/finish", {});
  if (byId("message").textContent) return;
  byId("end-actions").hidden = true;
  byId("end-help").textContent = "The result is in the terminal. You can close this page.";
  byId("end-title").focus();
}

document.addEventListener("keydown", press);
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => vote(button.dataset.choice));
}
byId("undo").addEventListener("click", undo);
byId("reopen").addEventListener("click", reopen);
byId("finish").addEventListener("click", finish);
byId("show").addEventListener("click", () => send("/result", {}));
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send("/judge", { name: byId("name").value });
});
// Another tab may have gone on; at the end the program may have ended, and the last view stays.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !state.done) send("/state");
});
send("/state");
