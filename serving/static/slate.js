// The visitor's slate: click a tile, the event goes out, the slate is asked for again with that event applied.
const N = 10;
const WAIT_MS = 2000;

function hue(text) {
  let hash = 2166136261;
  for (const character of text) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return (((hash >>> 0) * 0.6180339887) % 1) * 360;
}

function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// A small picture made from the item's id: three waves.
function art(id) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 72 88");
  svg.setAttribute("preserveAspectRatio", "xMidYMid slice");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("art");
  let seed = hue(id);
  for (let wave = 0; wave < 3; wave++) {
    seed = (seed * 7.13 + 53) % 360;
    const y = 22 + wave * 21 + (seed % 9);
    const bend = 8 + (seed % 15);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M0 ${y}C${18 + (seed % 11)} ${y - bend} ${40 + (seed % 13)} ${y + bend} 72 ${y - bend / 2}V88H0Z`);
    svg.append(path);
  }
  return svg;
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(4));
  return `visitor-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

async function ask(url, options) {
  const response = await fetch(url, { cache: "no-store", ...options });
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const error = body.error ?? {};
  throw new Error(error.expected ? `${error.where}: expected ${error.expected}, got ${error.got}` : `the server answered ${response.status}`);
}

export class Slate {
  constructor($) {
    this.$ = $;
    this.busy = false;
    this.shown = new Map(); // item id -> its <li>
  }

  start() {
    this.visitor = localStorage.getItem("freshet.visitor") ?? this.renew();
    this.trail = JSON.parse(localStorage.getItem("freshet.trail") ?? "[]");
    this.$("visitor").textContent = this.visitor;
    this.$("forget").addEventListener("click", () => this.forget());
    this.drawTrail();
    this.load();
  }

  renew() {
    const id = newId();
    localStorage.setItem("freshet.visitor", id);
    return id;
  }

  forget() {
    this.visitor = this.renew();
    this.trail = [];
    localStorage.setItem("freshet.trail", "[]");
    this.$("visitor").textContent = this.visitor;
    this.$("timing").hidden = true;
    this.$("timing-hint").hidden = false;
    this.drawTrail();
    this.load();
  }

  async fetchSlate(after) {
    const query = new URLSearchParams({ n: N, surface: "page" });
    if (after) {
      query.set("after", after);
      query.set("wait_ms", WAIT_MS);
    }
    return ask(`/v1/recommendations/${encodeURIComponent(this.visitor)}?${query}`);
  }

  async load() {
    clearTimeout(this.again);
    try {
      const slate = await this.fetchSlate(null);
      this.draw(slate, false);
      if (slate.items.length < N) this.again = setTimeout(() => this.load(), 1500); // the catalogue is still coming in
    } catch (error) {
      this.say(`No slate yet: ${error.message}`);
      this.again = setTimeout(() => this.load(), 2000);
    }
  }

  say(text) {
    this.$("empty").textContent = text;
    this.$("empty").hidden = !text;
  }

  async act(item, position, action) {
    if (this.busy) return;
    clearTimeout(this.again);
    this.busy = true;
    this.shown.get(item.item_id)?.classList.add("pressed");
    const base = { user_id: this.visitor, item_id: item.item_id, slate_id: this.slateId, position, surface: "page", ts: Date.now() / 1000, event_id: crypto.randomUUID?.() ?? newId() + Date.now() };
    const event = action ? { type: "action", name: action, ...base } : { type: "click", ...base };
    const began = performance.now();
    try {
      const { token } = await ask("/v1/events", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify([event]) });
      const sent = performance.now();
      const slate = await this.fetchSlate(token);
      const drawn = performance.now();
      if (!action) this.remember(item);
      this.draw(slate, true);
      this.time(sent - began, drawn - sent, slate);
    } catch (error) {
      this.say(`That click did not arrive: ${error.message}. Try once more.`);
      this.shown.get(item.item_id)?.classList.remove("pressed");
    }
    this.busy = false;
  }

  remember(item) {
    this.trail = [{ title: item.title || item.item_id, kind: item.kind }, ...this.trail].slice(0, 6);
    localStorage.setItem("freshet.trail", JSON.stringify(this.trail));
    this.drawTrail();
  }

  drawTrail() {
    this.$("trail").hidden = this.trail.length === 0;
    this.$("trail-list").replaceChildren(...this.trail.map(({ title, kind }) => {
      const chip = make("li", "", title);
      chip.style.setProperty("--hue", hue(kind ?? ""));
      return chip;
    }));
  }

  time(sent, drawn, slate) {
    const text = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0)) + " ms";
    const whole = sent + drawn;
    this.$("timing").hidden = false;
    this.$("timing-hint").hidden = true;
    this.$("timing-total").textContent = text(whole);
    for (const [name, value] of [["leg-send", sent], ["leg-draw", drawn]]) {
      this.$(name).style.flexGrow = String(Math.max(0.15, value / whole));
      this.$(name).querySelector("b").textContent = text(value);
    }
    const fresh = [...this.shown.values()].filter((tile) => tile.classList.contains("new")).length;
    const applied = slate.applied === false ? "Your click was not applied in time; it will be in the next slate." : `${fresh} of ${slate.items.length} are new.`;
    this.$("changed").textContent = applied;
    this.$("said").textContent = `New slate in ${text(whole)}. ${applied}`;
  }

  draw(slate, compare) {
    this.slateId = slate.slate_id;
    this.say(slate.items.length ? "" : slate.reason || "Nothing to show yet.");
    const list = this.$("tiles");
    const focused = list.contains(document.activeElement) ? [...list.children].indexOf(document.activeElement.closest("li")) : -1;
    const before = new Map([...this.shown].map(([id, tile]) => [id, tile.getBoundingClientRect()]));
    this.shown = new Map(slate.items.map((item, position) => [item.item_id, this.tile(item, position, compare && !before.has(item.item_id))]));
    list.replaceChildren(...this.shown.values());
    list.setAttribute("aria-busy", "false");
    if (focused >= 0) list.children[Math.min(focused, list.children.length - 1)]?.querySelector("button").focus({ preventScroll: true });
    if (compare && !matchMedia("(prefers-reduced-motion: reduce)").matches) this.animate(before);
  }

  // Tiles that stayed glide to their new place, new ones rise in.
  animate(before) {
    const ease = { duration: 420, easing: "cubic-bezier(.2,.7,.2,1)", fill: "backwards" };
    let k = 0;
    for (const [id, tile] of this.shown) {
      const old = before.get(id);
      const now = tile.getBoundingClientRect();
      if (old) tile.animate([{ transform: `translate(${old.left - now.left}px, ${old.top - now.top}px)` }, { transform: "none" }], ease);
      else tile.animate([{ opacity: 0, transform: "translateY(14px) scale(.97)" }, { opacity: 1, transform: "none" }], { ...ease, delay: 35 * k++ });
    }
  }

  tile(item, position, isNew) {
    item.kind = item.categories?.[0] ?? "";
    const tile = make("li", isNew ? "tile new" : "tile");
    tile.style.setProperty("--hue", hue(item.kind || item.item_id));
    const open = make("button", "open");
    open.type = "button";
    const words = make("span", "words");
    const kind = make("span", "kind", item.kind || `no. ${position + 1}`);
    kind.append(make("span", "is-new", "new"));
    const why = make("span", "why");
    why.append(make("b", "", item.channel.replaceAll("_", " ")), item.reason ? ` · ${item.reason}` : "");
    words.append(kind, make("span", "title", item.title || item.item_id), why);
    open.append(art(item.item_id), words);
    open.addEventListener("click", () => this.act(item, position, ""));
    const not = make("button", "not", "✕");
    not.type = "button";
    not.title = "Not for me";
    not.setAttribute("aria-label", `Not for me: ${item.title || item.item_id}`);
    not.addEventListener("click", () => this.act(item, position, "hide"));
    tile.append(open, not);
    return tile;
  }
}
