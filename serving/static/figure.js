// A number with its definition: what it is, its unit, over which window and from how many, on hover and on focus.
import { h, say } from "./dom.js";
import { NONE, number, span } from "./format.js";

const known = new Map();
let card = null;
let shown = null;

// Add definitions: {key: {name, what, unit, window}}; `window` is seconds or words.
export function register(definitions) {
  for (const [key, definition] of Object.entries(definitions)) known.set(key, definition);
  prepare();
}

// Make `element` explain itself; `n` (sample size) and `window` of this very number override the definition's.
export function define(element, key, { n, window } = {}) {
  element.dataset.def = key;
  if (element.tabIndex < 0) element.tabIndex = 0;
  tell(element, n, window);
  return element;
}

function tell(element, n, window) {
  if (n === undefined || n === null) delete element.dataset.n;
  else if (element.dataset.n !== String(n)) element.dataset.n = n;
  if (window !== undefined && window !== null) element.dataset.window = window;
  if (shown === element) fill(element);
}

// A large number with name, unit and a note. `.set(text, {note, n, window, tone})` changes it.
export function figure(key, { spark } = {}) {
  const definition = known.get(key) ?? { name: key };
  const value = h("b", {}, NONE);
  const note = h("span", { class: "note" });
  const unit = h("span", {}, definition.unit ?? "");
  const root = define(h("div", { class: "figure" }, h("span", { class: "name" }, definition.name), h("span", { class: "value" }, value, " ", unit), spark, note), key);
  root.set = (text, { note: words = "", n, window, tone = "" } = {}) => {
    say(value, text);
    say(note, words);
    unit.hidden = text === NONE;
    root.dataset.tone = tone;
    tell(root, n, window);
  };
  root.say = (words) => say(note, words);
  return root;
}

// A table head cell whose definition also holds for every cell below it.
export function column(key, { numeric = false, label } = {}) {
  return define(h("th", { scope: "col", class: numeric ? "num" : undefined }, label ?? known.get(key)?.name ?? key), key);
}

// A small number inside text.
export function inline(key, text, facts = {}) {
  return define(h("span", { class: "tabular" }, text), key, facts);
}

// Set such a small number, its sample size and its window.
export function setInline(element, text, { n, window } = {}) {
  say(element, text);
  tell(element, n, window);
}

function explained(target) {
  const near = target instanceof Element ? target.closest("[data-def], td") : null;
  if (!near || near.dataset.def !== undefined) return near;
  const head = near.closest("table")?.tHead?.rows[0]?.cells[near.cellIndex];
  return head?.dataset.def !== undefined ? near : null;
}

function facts(element) {
  const head = element.dataset.def === undefined ? element.closest("table")?.tHead?.rows[0]?.cells[element.cellIndex] : element;
  const definition = known.get(head?.dataset.def) ?? null;
  if (!definition) return null;
  const window = element.dataset.window ?? head.dataset.window ?? definition.window;
  const n = element.dataset.n ?? head.dataset.n;
  return {
    ...definition,
    window: window === undefined ? null : Number.isFinite(Number(window)) ? `the last ${span(Number(window))}` : window,
    n: n === undefined ? (definition.n ?? "not told yet") : Number.isFinite(Number(n)) ? number(Number(n)) : n,
  };
}

function fill(element) {
  const told = facts(element);
  if (!told) return false;
  const rows = [["unit", told.unit || "none"], ["window", told.window], ["sample", told.n]].filter(([, text]) => text);
  card.replaceChildren(h("b", {}, told.name), told.what ?? "", h("dl", {}, rows.map(([term, text]) => [h("dt", {}, term), h("dd", {}, String(text))])));
  return true;
}

function show(element) {
  if (element === shown) return;
  hide();
  if (!element || !fill(element)) return;
  shown = element;
  element.setAttribute("aria-describedby", card.id);
  card.hidden = false;
  const box = element.getBoundingClientRect();
  const size = card.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - size.width - 8);
  const below = box.bottom + 8 + size.height < innerHeight;
  card.style.left = `${left}px`;
  card.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`;
}

function hide() {
  if (!shown) return;
  shown.removeAttribute("aria-describedby");
  shown = null;
  card.hidden = true;
}

function prepare() {
  if (card) return;
  card = h("div", { class: "definition", role: "tooltip", id: "definition", hidden: true });
  document.body.append(card);
  document.addEventListener("pointerover", (event) => event.pointerType !== "touch" && show(explained(event.target)));
  document.addEventListener("focusin", (event) => event.target.matches?.(":focus-visible") && show(explained(event.target)));
  document.addEventListener("focusout", hide);
  document.addEventListener("click", (event) => show(explained(event.target)));
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", hide, { passive: true, capture: true });
}
