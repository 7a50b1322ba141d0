// A request and its answers: the stream, the measurements under it, the prompt and the code.
import { postJson, streamAnswer } from "./api.js";
import { asCurl, asJson, asPython } from "./code.js";
import { copyButton, element, formatCount, formatNumber, makeTabs } from "./dom.js";
import { promptDetails } from "./tokens.js";

// A group is one model's answers; a card is one answer.
function makeCard(index, count) {
  const text = document.createTextNode("");
  const body = element("div", { class: "text" }, text);
  const stats = element("p", { class: "stats" });
  const foot = element("div", { class: "foot", hidden: true }, stats, copyButton(() => text.data, "the answer"));
  const title = count > 1 ? [element("h4", {}, `Answer ${index + 1}`)] : [];
  return { text, body, stats, foot, root: element("article", { class: "card" }, ...title, body, foot) };
}

function makeGroup(model, count) {
  const cards = Array.from({ length: count }, (_, index) => makeCard(index, count));
  const error = element("p", { class: "error", hidden: true });
  const grid = element("div", { class: "grid" }, ...cards.map((card) => card.root));
  const details = element("div", { class: "about" });
  const heading = element("h3", {}, model.title);
  return { cards, error, details, root: element("section", { class: "group" }, heading, grid, error, details) };
}

// A model of this server is asked for a completion of the prompt's tokens, one of another server for a
// chat, to which it applies its own template.
const localRequest = async (model, { instruction, input, values }, settings, signal) => {
  const prompt = await postJson("/page/prompt", { model: model.id, instruction, input }, signal);
  return { path: "/v1/completions", prompt, body: completionBody(model, prompt, values, settings) };
};

function remoteRequest(_model, { instruction, input, values }) {
  const { max_new_tokens: most, stop, top_k, repetition_penalty, ...sampling } = values;
  const body = {
    instruction,
    input,
    ...(most ? { max_tokens: most } : {}),
    ...sampling,
    ...(stop.length ? { stop } : {}),
    ...(top_k ? { top_k } : {}), // not OpenAI's: some servers refuse them
    ...(repetition_penalty !== 1 ? { repetition_penalty } : {}),
  };
  return { path: "/page/compared", prompt: null, body };
}

// max_tokens is always sent: OpenAI's default would be 16. An empty field means all that fits.
function completionBody(model, prompt, values, settings) {
  const { max_new_tokens: wanted, stop, ...sampling } = values;
  const total = Math.min(settings.inputs.total_tokens?.default ?? settings.context, settings.context);
  const limit = wanted || prompt.tokens.length >= total ? settings.context : total;
  const room = limit - prompt.tokens.length;
  return {
    model: model.id,
    prompt: prompt.tokens.map((token) => token.id),
    max_tokens: Math.max(1, Math.min(wanted ?? room, room)),
    ...sampling,
    ...(stop.length ? { stop } : {}),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true }, // a stopped answer has counts too
  };
}

function receive(group, records, choice) {
  const record = records[choice.index];
  const text = choice.text ?? choice.delta?.content;
  record.tokens = choice.generated_tokens ?? record.tokens;
  if (text) {
    record.last = performance.now();
    record.first ??= record.last;
    record.characters += text.length;
    group.cards[choice.index].text.appendData(text);
  }
  record.finish = choice.finish_reason ?? record.finish;
}

function finishText(record, body) {
  const most = body.max_tokens ? ` of ${formatCount(body.max_tokens, "token")}` : "";
  if (record.finish === "length") return `cut off at the limit${most}`;
  if (record.finish === "stop") return body.stop ? "ended by itself or at a stop text" : "ended by itself";
  return "not complete";
}

function statsText(record, records, usage, body, sent) {
  // this server counts the tokens of each answer, others only those of all together
  const tokens = record.tokens ?? (records.length === 1 ? usage?.completion_tokens : undefined);
  const seconds = (record.last - record.first) / 1000;
  return [
    ...(tokens === undefined ? [] : [formatCount(tokens, "token")]),
    ...(tokens > 1 && seconds > 0 ? [`${formatNumber(Number(((tokens - 1) / seconds).toPrecision(3)))} tokens/s`] : []),
    ...(record.first ? [`first token after ${((record.first - sent) / 1000).toFixed(2)} s`] : []),
    finishText(record, body),
    `seed ${body.seed}`,
  ].join(" · ");
}

function showStats(group, records, usage, body, sent) {
  records.forEach((record, index) => {
    const card = group.cards[index];
    card.stats.textContent = statsText(record, records, usage, body, sent);
    card.foot.hidden = false;
  });
}

let made = 0; // ids of the code tabs must be unique in the page

function codeDetails(request, key) {
  const id = `code-${(made += 1)}`;
  const texts = { curl: asCurl(request, key), Python: asPython(request, key), JSON: asJson(request) };
  const names = Object.keys(texts);
  const tabs = names.map((name, index) => element("button", {
    type: "button",
    role: "tab",
    id: `${id}-tab-${name}`,
    "aria-controls": `${id}-${name}`,
    "aria-selected": String(index === 0),
    tabindex: index === 0 ? "0" : "-1",
  }, name));
  const panels = names.map((name, index) => element(
    "div",
    { role: "tabpanel", id: `${id}-${name}`, "aria-labelledby": `${id}-tab-${name}`, hidden: index > 0 },
    element("pre", {}, element("code", {}, texts[name])),
    copyButton(() => texts[name], `the request as ${name}`),
  ));
  const list = element("div", { role: "tablist", "aria-label": "Form of the request" }, ...tabs);
  makeTabs(list);
  return element("details", {}, element("summary", {}, "This request as curl, Python or JSON"), list, ...panels);
}

function showError(group, error) {
  const stopped = error.name === "AbortError";
  const words = stopped ? "Stopped by you." : error.message;
  group.error.textContent = words;
  group.error.classList.toggle("muted", stopped);
  group.error.hidden = false;
  for (const card of group.cards) card.root.hidden = card.text.data === ""; // what had arrived is kept
  return stopped ? "Stopped." : words;
}

// Streams one model's answers; returns what the history keeps, and the state to announce.
async function askModel(group, model, asked, settings, signal) {
  const records = group.cards.map(() => ({ characters: 0, finish: null }));
  let state = "Done.";
  let usage, body, sent;
  const requestFor = model.url ? remoteRequest : localRequest;
  for (const card of group.cards) card.body.classList.add("streaming");
  try {
    const made = await requestFor(model, asked, settings, signal);
    ({ body } = made);
    const { instruction, input } = asked;
    group.details.append(...(made.prompt
      ? [promptDetails(made.prompt), codeDetails({ instruction, input, ...made }, settings.key)]
      : [element("p", { class: "help" }, `Asked at ${model.url}, which applies its own chat template.`)]));
    sent = performance.now();
    for await (const chunk of streamAnswer(made.path, body, signal)) {
      for (const choice of chunk.choices) receive(group, records, choice);
      usage = chunk.usage ?? usage;
    }
  } catch (error) {
    state = showError(group, error);
  }
  for (const card of group.cards) card.body.classList.remove("streaming");
  if (usage || records.some((record) => record.characters)) showStats(group, records, usage, body, sent);
  const answers = group.cards.map((card) => ({ text: card.text.data, stats: card.stats.textContent }));
  return { state, model: model.title, answers };
}

function show(root, groups) {
  root.replaceChildren(...groups.map((group) => group.root));
  root.classList.toggle("compare", groups.length > 1);
}

// Both models are asked at the same time, each with its own tokens of the same prompt.
export function askModels(root, models, asked, settings, signal) {
  const groups = models.map((model) => makeGroup(model, asked.values.n));
  show(root, groups);
  return Promise.all(models.map((model, index) => askModel(groups[index], model, asked, settings, signal)));
}

// An entry of the history holds texts only; its prompt and code come with the next request.
export function showSaved(root, entry) {
  const groups = entry.groups.map(({ model, answers }) => {
    const group = makeGroup({ title: model }, answers.length);
    answers.forEach(({ text, stats }, index) => {
      group.cards[index].text.data = text;
      group.cards[index].stats.textContent = stats;
      group.cards[index].foot.hidden = false;
    });
    return group;
  });
  show(root, groups);
}
