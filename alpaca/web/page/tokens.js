// A prompt as its tokens: one box each, ids on hover and focus, whitespace made visible.
import { arrowTarget, element, formatCount } from "./dom.js";

const MARKS = { " ": "·", "\n": "↵", "\t": "→" };

function tokenBox({ id, text }, index) {
  const shown = [...text].map((letter) =>
    letter in MARKS ? element("span", { class: "space" }, MARKS[letter]) : letter);
  return element(
    "span",
    {
      role: "option",
      class: "token",
      tabindex: index === 0 ? "0" : "-1",
      "aria-selected": "false",
      "aria-label": `${JSON.stringify(text)}, token ${id}`,
      title: `token ${id}`,
    },
    ...(shown.length ? shown : ["∅"]),
  );
}

// A token that ends in a line break ends a line here too; role=none keeps the list flat.
function linesOf(tokens, boxes) {
  const lines = [element("div", { role: "none", class: "line" })];
  tokens.forEach(({ text }, index) => {
    lines.at(-1).append(boxes[index]);
    if (text.endsWith("\n")) lines.push(element("div", { role: "none", class: "line" }));
  });
  return lines.filter((line) => line.hasChildNodes());
}

// One Tab stop for all tokens, arrow keys inside: a prompt may have thousands.
function tokenList(tokens) {
  const hint = "Point at a token, or move to one with the arrow keys, to see its id.";
  const current = element("p", { class: "help", "aria-hidden": "true" }, hint); // the option's label says it too
  const boxes = tokens.map(tokenBox);
  const list = element("div", { role: "listbox", "aria-label": "Tokens of the prompt", class: "tokens" },
    ...linesOf(tokens, boxes));
  const show = (box) => {
    const index = boxes.indexOf(box);
    if (index < 0) return;
    const { id, text } = tokens[index];
    current.textContent = `Token ${index + 1} of ${tokens.length}: id ${id}, text ${JSON.stringify(text)}`;
  };
  list.addEventListener("pointerover", (event) => show(event.target.closest(".token")));
  list.addEventListener("focusin", ({ target }) => {
    for (const box of list.querySelectorAll("[aria-selected=true], [tabindex='0']")) {
      box.setAttribute("aria-selected", "false");
      box.tabIndex = -1;
    }
    target.setAttribute("aria-selected", "true");
    target.tabIndex = 0;
    show(target);
  });
  list.addEventListener("keydown", (event) => {
    const target = arrowTarget(event, boxes);
    if (!target) return;
    event.preventDefault();
    target.focus();
  });
  return [list, current];
}

export function promptDetails(prompt) {
  return element(
    "details",
    {},
    element("summary", {}, `Prompt as sent: ${formatCount(prompt.tokens.length, "token")}`),
    ...tokenList(prompt.tokens),
  );
}
