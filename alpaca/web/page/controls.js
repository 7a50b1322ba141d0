// The settings: one slider and one number field each, with the server's ranges and defaults.
import { byId, element, formatNumber } from "./dom.js";

const SLIDERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "n"];
const STEPS = { integer: 1, number: 0.01 };
const OPEN_SLIDER = 100; // a slider needs an end; the number field accepts more

const fieldId = (name) => `setting-${name}`;

// No more than the server can do: n by its slots, max_new_tokens by its context.
function limitsOf(name, input, settings) {
  const most = { n: settings.slots, max_new_tokens: settings.context }[name] ?? Infinity;
  return { minimum: input.minimum ?? 0, maximum: Math.min(input.maximum ?? Infinity, most) };
}

const rangeText = ({ minimum, maximum }) =>
  maximum === Infinity
    ? `at least ${formatNumber(minimum)}`
    : `from ${formatNumber(minimum)} to ${formatNumber(maximum)}`;

function numberField(name, input, limits) {
  const id = fieldId(name);
  return element("input", {
    id,
    name,
    type: "number",
    inputmode: input.type === "integer" ? "numeric" : "decimal",
    step: STEPS[input.type] ?? "any",
    min: limits.minimum,
    ...(limits.maximum === Infinity ? {} : { max: limits.maximum }),
    ...(input.default === undefined || input.default === null ? {} : { required: true }),
    "aria-describedby": `${id}-help ${id}-error`,
    autocomplete: "off",
  });
}

function sliderOf(name, field, limits) {
  const end = limits.maximum === Infinity ? OPEN_SLIDER : limits.maximum;
  const slider = element("input", {
    type: "range",
    min: limits.minimum,
    max: end,
    step: field.step,
    "aria-label": `${name} (slider)`,
  });
  slider.addEventListener("input", () => {
    field.value = slider.value;
    check(field);
  });
  // An empty field means no limit of its own: the slider shows that as its end.
  field.addEventListener("input", () => (slider.value = field.value === "" ? end : field.value));
  return slider;
}

function row(name, input, settings, slider) {
  const limits = limitsOf(name, input, settings);
  const field = numberField(name, input, limits);
  const id = field.id;
  field.dataset.range = rangeText(limits);
  field.dataset.default = input.default ?? "";
  if (!field.required) field.placeholder = name === "seed" ? "random" : "no limit";
  field.addEventListener("change", () => check(field));
  return element(
    "div",
    { class: "field setting" },
    element("label", { for: id }, name),
    field,
    ...(slider ? [sliderOf(name, field, limits)] : []),
    element("p", { class: "error", id: `${id}-error`, hidden: true }),
    element("p", { class: "help", id: `${id}-help` }, input.description ?? ""),
  );
}

// Range errors are shown at the field: the server's would come only after the request.
function check(field) {
  const { valueMissing, badInput, rangeUnderflow, rangeOverflow } = field.validity;
  const broken = field.step === "1" && field.value !== "" && !Number.isInteger(Number(field.value));
  const wrong = valueMissing || badInput || rangeUnderflow || rangeOverflow || broken;
  const error = byId(`${field.id}-error`);
  error.textContent = `Must be a ${field.step === "1" ? "whole " : ""}number, ${field.dataset.range}.`;
  error.hidden = !wrong;
  field.setAttribute("aria-invalid", String(wrong));
  return !wrong;
}

const fields = () => [...byId("settings").querySelectorAll("input[type=number]")];

function setField(field, value) {
  field.value = value;
  field.dispatchEvent(new Event("input"));
  check(field);
}

export function buildSettings(settings) {
  const rows = SLIDERS.filter((name) => name in settings.inputs).map((name) =>
    row(name, settings.inputs[name], settings, true));
  if (settings.inputs.seed) rows.push(row("seed", settings.inputs.seed, settings, false));
  byId("fields").replaceChildren(...rows);
  byId("stop-description").textContent = settings.inputs.stop?.description ?? "";
  byId("input-help").textContent = settings.inputs.input?.description ?? "";
  resetSettings();
}

export function resetSettings() {
  for (const field of fields()) setField(field, field.dataset.default);
  byId("stop").value = "";
}

// The first field that is wrong gets the focus, and the settings are opened to show it.
export function checkSettings() {
  const wrong = fields().filter((field) => !check(field));
  if (wrong.length) {
    byId("settings").open = true;
    wrong[0].focus();
  }
  return wrong.length === 0;
}

const unescapeLine = (line) => line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]);
const escapeLine = (text) => text.replace(/[\\\n\t]/g, (found) => ({ "\n": "\\n", "\t": "\\t", "\\": "\\\\" })[found]);

// {temperature: 0.75, ..., max_new_tokens: null, seed: null, stop: []}
export function readSettings() {
  const values = {};
  for (const field of fields()) values[field.name] = field.value === "" ? null : Number(field.value);
  values.stop = byId("stop").value.split("\n").filter((line) => line !== "").map(unescapeLine);
  return values;
}

export function writeSettings(values) {
  for (const field of fields()) setField(field, values[field.name] ?? field.dataset.default);
  byId("stop").value = (values.stop ?? []).map(escapeLine).join("\n");
}
