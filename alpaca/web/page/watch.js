// The watched training run: polled while its tab is visible, drawn when it has changed.
import { getJson } from "./api.js";
import { byId, element, formatDuration, formatNumber } from "./dom.js";
import { plot } from "./plot.js";

const SECONDS = 3;
const SAMPLES = 5;
let drawn = ""; // what is shown
let drawnSamples = "";
let run = null;

const latest = (points) => (points.length ? formatNumber(points.at(-1)[1]) : null);

function progressText({ step, total_steps: total }) {
  return total ? `${formatNumber(step)} of ${formatNumber(total)}` : formatNumber(step);
}

function showFacts(shown) {
  const facts = {
    Step: progressText(shown),
    Loss: latest(shown.loss),
    "Held-out loss": latest(shown.eval_loss),
    "Learning rate": latest(shown.learning_rate),
    "Tokens a second": latest(shown.tokens_per_second),
    "Time left": shown.finished || shown.seconds_left === null ? null : formatDuration(shown.seconds_left),
  };
  const known = Object.entries(facts).filter(([, value]) => value !== null);
  byId("run-facts").replaceChildren(
    ...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function showPlots({ loss, eval_loss: evalLoss, learning_rate: rate, tokens_per_second: speed }) {
  const root = byId("run-plots");
  const column = Number.parseFloat(getComputedStyle(root).gridTemplateColumns) || root.clientWidth;
  root.replaceChildren(
    plot("Loss", [{ name: "Training loss", points: loss }, { name: "Held-out loss", points: evalLoss, marks: true }],
      { width: root.clientWidth }),
    plot("Learning rate", [{ name: "Learning rate", points: rate }], { width: column, zero: true }),
    plot("Tokens a second", [{ name: "Tokens a second", points: speed }], { width: column, zero: true }),
  );
}

// Redrawn only when there is a new one: a reader may be selecting text.
function showSamples(samples) {
  const text = JSON.stringify(samples);
  if (text === drawnSamples) return;
  drawnSamples = text;
  const newest = samples.slice(-SAMPLES).reverse();
  byId("run-samples").replaceChildren(
    ...(newest.length ? [] : [element("p", { class: "muted" }, "None yet.")]),
    ...newest.map(({ step, prompt, answer }) => element(
      "article",
      { class: "card" },
      element("h4", {}, `Step ${formatNumber(step)}`),
      element("p", { class: "text asked" }, prompt),
      element("div", { class: "text" }, answer))),
  );
}

function showRun() {
  byId("run").hidden = false;
  byId("run-title").textContent = `Training run in ${run.folder}`;
  const bar = byId("run-progress");
  bar.hidden = !run.total_steps;
  bar.value = run.total_steps ? run.step / run.total_steps : 0;
  showFacts(run);
  showPlots(run);
  showSamples(run.samples);
}

// Announced only when it changes: running, silent for minutes, finished, unreachable.
function say(text) {
  const state = byId("run-state");
  if (state.textContent !== text) state.textContent = text;
}

function stateText({ finished, updated }) {
  if (finished) return "The run has finished.";
  if (updated === null) return "The run has not logged a step yet.";
  const minutes = Math.floor((Date.now() / 1000 - updated) / 60);
  if (minutes >= 2) return `No new line in its log for ${minutes} min: the run is slow, or has stopped.`;
  return `Running. This page asks for news every ${SECONDS} s.`;
}

async function poll() {
  try {
    run = await getJson("/page/run");
  } catch (error) {
    return say(`${error.message} This page asks again every ${SECONDS} s.`);
  }
  say(stateText(run));
  const text = JSON.stringify(run);
  if (text === drawn) return;
  drawn = text;
  showRun();
}

// Returns a function that is told whether the tab is visible; a hidden window polls nothing.
export function startWatch() {
  let visible = false;
  let busy = false;
  const tick = async () => {
    if (!visible || document.hidden || busy) return;
    busy = true;
    await poll();
    busy = false;
  };
  setInterval(tick, SECONDS * 1000);
  document.addEventListener("visibilitychange", tick);
  window.addEventListener("resize", () => visible && run && showPlots(run));
  return (now) => {
    visible = now;
    tick();
  };
}
