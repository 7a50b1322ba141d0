// Elements, tabs, copy buttons and number formats that every part of the page uses.

export const byId = (id) => document.getElementById(id);

// Children are elements or strings; strings become text nodes, so no text is ever parsed as HTML.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const english = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const whole = new Intl.NumberFormat("en");

export const formatCount = (count, noun) => `${whole.format(count)} ${noun}${count === 1 ? "" : "s"}`;

// Learning rates are written as 2e-5, the way they are given to train.py.
export function formatNumber(value) {
  if (value !== 0 && Math.abs(value) < 0.001) return String(Number(value.toPrecision(3)).toExponential());
  return Number.isInteger(value) ? whole.format(value) : english.format(value);
}

export function formatDuration(seconds) {
  const total = Math.round(seconds);
  if (total < 60) return `${total} s`;
  if (total < 3600) return `${Math.floor(total / 60)} min ${total % 60} s`;
  return `${Math.floor(total / 3600)} h ${Math.floor((total % 3600) / 60)} min`;
}

const ARROWS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

// The item that a key moves to, or undefined: one Tab stop for the group, arrows inside it.
export function arrowTarget(event, items) {
  const at = items.indexOf(event.target);
  if (event.key === "Home") return items[0];
  if (event.key === "End") return items.at(-1);
  const move = ARROWS[event.key];
  return move && at >= 0 ? items[(at + move + items.length) % items.length] : undefined;
}

// ARIA tabs with automatic activation (W3C ARIA Authoring Practices, "Tabs").
export function makeTabs(list, onSelect = () => {}) {
  const tabs = () => [...list.querySelectorAll("[role=tab]")].filter((tab) => !tab.hidden);
  const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));
  const select = (chosen) => {
    for (const tab of list.querySelectorAll("[role=tab]")) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      panelOf(tab).hidden = tab !== chosen;
    }
    onSelect(panelOf(chosen).id);
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab);
  });
  list.addEventListener("keydown", (event) => {
    const target = arrowTarget(event, tabs());
    if (!target) return;
    event.preventDefault();
    target.focus();
    select(target);
  });
  return select;
}

// navigator.clipboard exists only on https and localhost; a server on the LAN is neither.
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { class: "offscreen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("the browser refused");
}

// The label is reset after a while; role=status announces the change.
export function copyButton(text, what) {
  const label = element("span", { role: "status" }, "Copy");
  const button = element("button", { type: "button", class: "small", "aria-label": `Copy ${what}` }, label);
  button.addEventListener("click", async () => {
    const failed = "Copying failed: select the text instead";
    const said = await copyText(text()).then(() => "Copied", () => failed);
    button.focus();
    button.setAttribute("aria-label", said);
    label.textContent = said;
    setTimeout(() => {
      label.textContent = "Copy";
      button.setAttribute("aria-label", `Copy ${what}`);
    }, 3000);
  });
  return button;
}
