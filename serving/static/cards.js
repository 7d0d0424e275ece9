// The building blocks of a page: cards, figures in a row, bars, facts, news, and asking before acting.
import { h, say } from "./dom.js";
import { define } from "./figure.js";
import { calm } from "./theme.js";

// A card with a heading; `width`: "half", "third", "two-thirds" or none.
export function card(title, { width = "", lead = "", aside = null, level = 2 } = {}, ...children) {
  const heading = h(`h${level}`, {}, title);
  const head = aside ? h("div", { class: "head" }, h("div", {}, heading, lead && h("p", { class: "lead" }, lead)), aside) : [heading, lead && h("p", { class: "lead" }, lead)];
  return h("section", { class: `card ${width}` }, head, children);
}

export function empty(title, next = "") {
  return h("p", { class: "empty" }, h("b", {}, title), next);
}

// What went wrong, and what to do: for polls and actions.
export function trouble(error) {
  const next = error.status === 401 || error.status === 403 ? "This page needs a key of scope admin, or a visit from the machine itself." : error.status === 404 ? "This server does not tell it." : "It is asked again by itself.";
  return h("p", { class: "notice warn", role: "status" }, `${error.message[0].toUpperCase()}${error.message.slice(1)}. ${next}`);
}

/* Rows of label, bar and number. `.set([{label, value, text, n, mark, href, color}], {max})`: value and mark in the unit of
   `max` (the largest value where not given). `def` defines the numbers; `named`: long labels. */
export function bars(title, def, { head = ["", ""], named = false } = {}) {
  const body = h("tbody");
  const number = define(h("th", { scope: "col", class: "num" }, head[1]), def);
  const root = h("div", { class: named ? "table bars named" : "table bars" }, h("table", {}, h("caption", { class: "visually-hidden" }, title), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, head[0]), h("td", {}), number)), body));
  const rows = new Map();
  root.set = (list, { max } = {}) => {
    const top = max ?? Math.max(1e-9, ...list.map((one) => Math.max(one.value ?? 0, one.mark ?? 0)));
    const share = (value) => `${Math.max(0, Math.min(100, (100 * (value ?? 0)) / top))}%`;
    const seen = list.map((one) => {
      const row = rows.get(one.label) ?? barRow(one);
      rows.set(one.label, row);
      row.fill.style.width = share(one.value);
      if (one.color) row.fill.style.setProperty("--bar", one.color);
      row.mark.hidden = one.mark === undefined;
      if (one.mark !== undefined) row.mark.style.left = share(one.mark);
      say(row.text, one.text);
      if (one.n !== undefined && one.n !== null) row.text.dataset.n = one.n;
      return row.root;
    });
    for (const label of [...rows.keys()]) if (!list.some((one) => one.label === label)) rows.delete(label);
    if (seen.length !== body.children.length || seen.some((row, k) => body.children[k] !== row)) body.replaceChildren(...seen);
  };
  return root;
}

function barRow(one) {
  const fill = h("i");
  const mark = h("u", { hidden: true });
  const text = h("td", { class: "num" });
  const label = one.href ? h("a", { href: one.href }, one.label) : one.label;
  return { root: h("tr", {}, h("th", { scope: "row", title: one.label }, label), h("td", { class: "bar-cell" }, h("div", { class: "meter", "aria-hidden": "true" }, fill, mark)), text), fill, mark, text };
}

// A definition list of small figures: [[key of definition, label, text, facts]...]
export function facts(list) {
  return h("dl", { class: "facts" }, list.map(([key, label, text, about]) => {
    const pair = h("div", {}, h("dt", {}, label), h("dd", {}, text));
    return key ? define(pair, key, about) : pair;
  }));
}

// One of several choices, as buttons: `choose(value)` is called with the picked one.
export function segments(label, choices, picked, choose) {
  const buttons = choices.map(([value, text]) => h("button", { type: "button", "aria-pressed": String(value === picked), onclick: () => {
    for (const [k, button] of buttons.entries()) button.setAttribute("aria-pressed", String(choices[k][0] === value));
    choose(value);
  } }, text));
  return h("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}

// Ask before acting; then act and say how it went. `act()` returns the words of success.
export function confirmed({ title, text, button, danger = false }, act) {
  const said = h("p", { role: "status" });
  const go = h("button", { class: danger ? "button danger" : "button", type: "button" }, button);
  const no = h("button", { class: "quiet", type: "button", onclick: () => box.close() }, "Cancel");
  const box = h("dialog", { "aria-labelledby": "asked" }, h("h2", { id: "asked" }, title), h("p", {}, text), said, h("div", { class: "acts" }, no, go));
  go.addEventListener("click", async () => {
    go.disabled = true;
    say(said, "Working …");
    try {
      say(said, await act());
      said.className = "notice good";
    } catch (error) {
      said.className = "notice bad";
      say(said, error.status === 401 || error.status === 403 ? `${error.message}. It needs the admin scope.` : error.message);
      go.disabled = false;
      return;
    }
    go.hidden = true;
    say(no, "Close");
    no.focus();
  });
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
  no.focus();
}

// Replace children of `root`, keeping the focus on what has the same data-key.
export function refill(root, ...children) {
  const key = root.contains(document.activeElement) ? document.activeElement.closest("[data-key]")?.dataset.key : undefined;
  root.replaceChildren(...children.flat().filter(Boolean));
  if (key !== undefined) root.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

// Call `step(share)` from 0 to 1 over `seconds`; at once where motion is not wanted. Returns how to stop.
export function glide(seconds, step) {
  let handle = 0;
  const began = performance.now();
  let odd = false;
  const turn = (now) => {
    odd = !odd;
    if (odd && now - began < 1000 * seconds) return (handle = requestAnimationFrame(turn)); // thirty pictures a second are smooth enough
    const share = calm() || document.hidden ? 1 : Math.min(1, (now - began) / (1000 * seconds));
    step(1 - (1 - share) ** 3);
    return share < 1 ? (handle = requestAnimationFrame(turn)) : 0;
  };
  handle = requestAnimationFrame(turn);
  return () => cancelAnimationFrame(handle);
}
