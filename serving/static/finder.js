// Find a user or an item by typing: a combobox over /-/search.
import { ask } from "./ask.js";
import { h } from "./dom.js";

const WAIT_MS = 180;
const MOST = 12;
let made = 0;

/* `what`: "users" or "items"; `choose(id)` is called with the picked one; a typed id that is not found can be picked too. */
export function finder(what, { label, value = "", choose }) {
  const id = `found-${made++}`;
  const list = h("ul", { class: "found", id, role: "listbox", "aria-label": `${label}: found`, hidden: true });
  const input = h("input", { type: "search", role: "combobox", "aria-expanded": "false", "aria-controls": id, "aria-autocomplete": "list", "aria-label": label, placeholder: label, autocomplete: "off", spellcheck: "false", value });
  let picked = -1;
  let timer = 0;
  let asked = 0;

  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const go = (chosen) => {
    close();
    input.value = chosen;
    choose(chosen);
  };
  const mark = (k) => {
    picked = k;
    [...list.children].forEach((option, place) => option.setAttribute("aria-selected", String(place === k)));
    if (k >= 0) {
      input.setAttribute("aria-activedescendant", list.children[k].id);
      list.children[k].scrollIntoView({ block: "nearest" });
    } else input.removeAttribute("aria-activedescendant");
  };

  async function look() {
    const turn = ++asked;
    let found = [];
    if (!input.value.trim()) return close();
    try {
      const told = await ask(`/-/search?${new URLSearchParams({ q: input.value.trim(), limit: MOST })}`);
      found = what === "users" ? told.users.map((user) => [user, ""]) : told.items.map((item) => [item.item_id, item.title, item.category]);
    } catch {
      found = []; // the typed id itself can still be picked
    }
    if (turn !== asked) return;
    const typed = input.value.trim();
    if (typed && !found.some(([one]) => one === typed)) found.push([typed, "open this id"]);
    list.replaceChildren(...found.slice(0, MOST + 1).map(([one, title, more], k) => h("li", { role: "option", id: `${id}-${k}`, "aria-selected": "false", onpointerdown: (event) => { event.preventDefault(); go(one); } }, h("b", {}, title && title !== "open this id" ? title : one), h("span", {}, title && title !== "open this id" ? `${one}${more ? ` · ${more}` : ""}` : title))));
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(found.length > 0));
    mark(-1);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(look, WAIT_MS);
  });
  input.addEventListener("focus", () => input.select());
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) look();
      else mark((picked + (event.key === "ArrowDown" ? 1 : -1) + list.children.length) % list.children.length);
    } else if (event.key === "Enter") {
      const chosen = picked >= 0 ? list.children[picked] : null;
      if (chosen) chosen.dispatchEvent(new PointerEvent("pointerdown", { cancelable: true }));
      else if (input.value.trim()) go(input.value.trim());
    }
  });
  return h("div", { class: "finder" }, input, list);
}
