// Past requests, in this browser only (localStorage); without it, until the page is closed.
import { byId, element } from "./dom.js";

const KEY = "alpaca-history-1";
const MOST = 50;
let entries = load();

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.slice(0, MOST) : [];
  } catch {
    return []; // storage is blocked, or somebody else's text is under the key
  }
}

// Where the quota is too small for all entries, the oldest are not stored.
function store() {
  for (let kept = entries.length; kept >= 0; kept = kept > 1 ? kept >> 1 : kept - 1) {
    try {
      localStorage.setItem(KEY, JSON.stringify(entries.slice(0, kept)));
      return true;
    } catch (error) {
      if (error.name !== "QuotaExceededError") return false;
    }
  }
  return false;
}

const written = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short", hourCycle: "h23" });

function row(entry, restore) {
  const { instruction, time, groups } = entry;
  const excerpt = groups[0]?.answers[0]?.text ?? "";
  const remove = () => {
    entries = entries.filter((other) => other !== entry);
    update(restore, "Entry deleted.");
    (byId("history-list").querySelector("button") ?? byId("tab-history")).focus();
  };
  return element(
    "li",
    {},
    element("button", { type: "button", class: "entry", onclick: () => restore(entry) },
      element("span", { class: "asked" }, instruction),
      element("span", { class: "muted excerpt" }, excerpt)),
    element("span", { class: "muted when" }, written.format(time)),
    element("button", { type: "button", class: "small", "aria-label": `Delete: ${instruction}`, onclick: remove }, "Delete"),
  );
}

function draw(restore) {
  byId("history-list").replaceChildren(...entries.map((entry) => row(entry, restore)));
  byId("history-clear").hidden = entries.length === 0;
}

function update(restore, said) {
  const stored = store();
  byId("history-state").textContent = stored ? said
    : `${said} This browser does not let the page store the history: it is lost when the page is closed.`.trim();
  draw(restore);
}

export function remember(entry, restore) {
  const others = load(); // another tab may have added some
  entries = [entry, ...(others.length ? others : entries)].slice(0, MOST);
  update(restore, "");
}

export function startHistory(restore) {
  byId("history-clear").addEventListener("click", () => {
    entries = [];
    update(restore, "All entries deleted.");
    byId("tab-history").focus();
  });
  draw(restore);
}
