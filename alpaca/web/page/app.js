// The page: asks the served model, keeps a history, watches a training run.
import { askModels, showSaved } from "./answers.js";
import { getJson } from "./api.js";
import { buildSettings, checkSettings, readSettings, resetSettings, writeSettings } from "./controls.js";
import { byId, element, makeTabs } from "./dom.js";
import { remember, startHistory } from "./history.js";
import { startWatch } from "./watch.js";

const POLL_SECONDS = 2; // until the model is loaded
const CHECK_SECONDS = 15; // from then on: a model to compare with may be loaded later
const BOTH = "both"; // of the model choice; the options are numbered, so no model has this value
const start = location.hash.slice(1); // the view that a reload comes back to
let settings = null; // the server's, once it has answered
let controller = null; // aborts the request that is running; null while none is

const say = (text) => (byId("progress").textContent = text);

function chooseView() {
  const watched = startWatch();
  const select = makeTabs(byId("views"), (view) => {
    history.replaceState(null, "", view === "ask" ? location.pathname : `#${view}`); // a reload stays here
    watched(view === "watch");
  });
  return (view) => select(byId(`tab-${view}`));
}

function fillExample({ instruction, input }) {
  byId("instruction").value = instruction;
  byId("input").value = input;
  byId("instruction").focus();
}

function buildExamples(examples) {
  byId("examples").hidden = examples.length === 0;
  byId("example-list").replaceChildren(...examples.map((example) => {
    const { instruction } = example;
    const attributes = { type: "button", title: instruction, onclick: () => fillExample(example) };
    return element("li", {}, element("button", attributes, instruction));
  }));
}

function buildModels(models) {
  const choices = models.map(({ title }, index) => element("option", { value: index }, title));
  byId("model-field").hidden = models.length < 2;
  const many = models.length > 2; // then one answers, unless all are asked for
  const all = element("option", { value: BOTH }, `Compare ${many ? `all ${models.length}` : "both"}, side by side`);
  if (models.length > 1) choices.splice(many ? models.length : 0, 0, all);
  byId("model").replaceChildren(...choices);
  const title = many ? `${models[0].title} and ${models.length - 1} more` : models.map((model) => model.title).join(" and ");
  byId("title").textContent = document.title = title;
}

const chosenModels = () =>
  byId("model").value === BOTH ? settings.models : [settings.models[Number(byId("model").value)]];

function useSettings(answered) {
  const first = settings === null;
  const known = settings?.models ?? [];
  settings = answered;
  byId("tab-watch").hidden = !settings.watch;
  if (first && settings.watch && start === "watch") view("watch");
  if (first) buildExamples(settings.examples);
  if (!settings.ready || JSON.stringify(settings.models) === JSON.stringify(known)) return;
  const chosen = known[Number(byId("model").value)]?.id; // none where all were compared
  buildModels(settings.models);
  const kept = settings.models.findIndex(({ id }) => id === chosen); // the choice stays as it was
  if (kept >= 0) byId("model").value = String(kept);
  if (known.length === 1 && settings.models.length === 2) say("A second model is loaded: you can compare the two.");
  if (byId("settings").hidden) buildSettings(settings); // before ready no limits are known
  byId("settings").hidden = false;
}

function showServer(text) {
  const state = byId("server-state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("empty", text === ""); // a live region must stay in the page
  byId("send").setAttribute("aria-disabled", String(text !== "" || controller !== null));
}

// Asks for the settings, often until the server is there and its model is loaded.
async function watchServer() {
  let seconds = POLL_SECONDS;
  const again = `This page asks again every ${POLL_SECONDS} s.`;
  try {
    useSettings(await getJson("/page/settings"));
    if (settings.ready) seconds = CHECK_SECONDS;
    showServer(settings.ready ? "" : `The model is loading. ${again}`);
  } catch (error) {
    showServer(`${error.message} ${again}`);
  }
  setTimeout(watchServer, seconds * 1000);
}

// The page draws the seed, so that every answer can be repeated: the server does not return its own.
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function readRequest() {
  const instruction = byId("instruction");
  const missing = instruction.value.trim() === "";
  byId("instruction-error").hidden = !missing;
  instruction.setAttribute("aria-invalid", String(missing));
  if (missing) instruction.focus();
  if (missing || !checkSettings()) return null;
  return { instruction: instruction.value, input: byId("input").value, values: readSettings() };
}

function setRunning(running) {
  const halt = byId("halt");
  if (!running && document.activeElement === halt) byId("send").focus(); // it is about to disappear
  halt.hidden = !running;
  byId("send").setAttribute("aria-disabled", String(running));
}

// The answers come below the form: out of sight on a phone.
function makeRoom() {
  byId("examples").open = false;
  const title = byId("answers-title");
  if (title.getBoundingClientRect().bottom > innerHeight * 0.7) title.scrollIntoView();
}

async function ask() {
  if (controller) return;
  if (!settings?.ready) return say("Not sent: the model is not loaded yet.");
  const form = readRequest();
  if (!form) return say("Not sent: see the message at the field.");
  const asked = { ...form, values: { ...form.values, seed: form.values.seed ?? randomSeed() } };
  controller = new AbortController();
  setRunning(true);
  say("Answering.");
  makeRoom();
  const outcomes = await askModels(byId("answers"), chosenModels(), asked, settings, controller.signal);
  controller = null;
  setRunning(false);
  say([...new Set(outcomes.map(({ state }) => state))].join(" "));
  const groups = outcomes.map(({ model, answers }) => ({ model, answers }));
  const answered = groups.some(({ answers }) => answers.some(({ stats }) => stats)); // an answer may be empty
  if (answered) remember({ ...form, groups, time: Date.now() }, restore);
}

function restore(entry) {
  if (controller) return view("ask"); // its answers are arriving where the saved ones would be shown
  byId("instruction").value = entry.instruction;
  byId("input").value = entry.input;
  if (settings) writeSettings(entry.values);
  showSaved(byId("answers"), entry);
  say("Restored from the history. Ask again for its prompt and code.");
  view("ask");
  byId("instruction").focus();
}

function listen() {
  byId("request").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
    if (event.key === "Escape") controller?.abort();
  });
  byId("halt").addEventListener("click", () => controller?.abort());
  byId("reset").addEventListener("click", () => {
    resetSettings();
    say("Settings reset to the defaults.");
  });
}

const view = chooseView();
listen();
startHistory(restore);
byId("settings").open = byId("examples").open = matchMedia("(min-width: 62rem)").matches;
view(start === "history" ? "history" : "ask");
watchServer();
