// A small line plot in SVG: axes, labels, a legend and a text summary.
import { element, formatNumber } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 240;
const MARGIN = { left: 60, right: 24, top: 12, bottom: 40 };

function shape(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// Round numbers (1, 2 or 5 times a power of ten) from at or below the range to at or above it.
export function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => span / size <= count);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from || 1)) * (end - start);

function yAxis(values, y, right) {
  return values.flatMap((value) => [
    shape("line", { class: "gridline", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }),
    shape("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, formatNumber(value)),
  ]);
}

function xAxis(values, x, bottom, right) {
  return [
    shape("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
    ...values.map((value) => shape("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, formatNumber(value))),
    shape("text", { x: (MARGIN.left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, "step"),
  ];
}

// Held-out loss has few points: a mark on each shows where it was measured.
function curve({ points, marks }, index, x, y) {
  const at = points.map(([step, value]) => [x(step).toFixed(1), y(value).toFixed(1)]);
  const dots = marks || at.length === 1 ? at.map(([cx, cy]) => shape("circle", { class: `dot-${index}`, cx, cy, r: 3 })) : [];
  return [shape("polyline", { class: `curve-${index}`, points: at.map((pair) => pair.join(",")).join(" ") }), ...dots];
}

function drawing(title, series, { width, zero }) {
  const points = series.flatMap((one) => one.points);
  const steps = points.map(([step]) => step);
  const values = points.map(([, value]) => value);
  const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
  const levels = ticks(zero ? 0 : Math.min(...values), Math.max(...values), 5);
  const [low, high] = [Math.min(...steps), Math.max(...steps)];
  const x = scale(low, high, MARGIN.left, right);
  const y = scale(levels[0], levels.at(-1), bottom, MARGIN.top);
  const marked = ticks(low, high, width < 500 ? 4 : 8).filter((step) => step >= low && step <= high);
  const svg = shape("svg", { role: "img", "aria-label": `Plot of ${title} by step`, width, height: HEIGHT });
  svg.append(...yAxis(levels, y, right), ...xAxis(marked, x, bottom, right));
  svg.append(...series.flatMap((one, index) => curve(one, index, x, y)));
  return svg;
}

function summary({ name, points }) {
  const [first, last] = [points[0], points.at(-1)];
  const lowest = points.reduce((best, point) => (point[1] < best[1] ? point : best));
  const highest = points.reduce((best, point) => (point[1] > best[1] ? point : best));
  const at = ([step, value]) => `${formatNumber(value)} at step ${formatNumber(step)}`;
  return `${name}: first ${at(first)}, last ${at(last)}, lowest ${at(lowest)}, highest ${at(highest)}.`;
}

// The swatch repeats the dashes of the curve, so that colour alone tells nothing.
function legend(series) {
  return element("p", { class: "legend" }, ...series.map(({ name }, index) => {
    const swatch = shape("svg", { width: 28, height: 10, "aria-hidden": "true" });
    swatch.append(shape("line", { class: `curve-${index}`, x1: 0, x2: 28, y1: 5, y2: 5 }));
    return element("span", {}, swatch, name);
  }));
}

// series: [{name, points: [[step, value], ...], marks}]; those without a finite point are left out.
// options: width in pixels, and zero where the axis of values starts there.
export function plot(title, series, options) {
  const finite = series
    .map((one) => ({ ...one, points: one.points.filter(([, value]) => Number.isFinite(value)) }))
    .filter((one) => one.points.length);
  const heading = element("h3", {}, title);
  if (!finite.length) return element("figure", {}, heading, element("p", { class: "muted" }, "Nothing logged yet."));
  return element(
    "figure",
    {},
    heading,
    ...(finite.length > 1 ? [legend(finite)] : []),
    drawing(title, finite, options),
    element("figcaption", { class: "help" }, finite.map(summary).join(" ")),
  );
}
