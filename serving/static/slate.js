// The visitor's slate: open a tile, the event goes out, the slate is asked for again with that event applied.
import { ask, post } from "./ask.js";
import { Detail } from "./detail.js";
import { h, s, say } from "./dom.js";
import { define, register } from "./figure.js";
import { ms, plural } from "./format.js";
import { Learnt, why } from "./learnt.js";
import { calm, hue } from "./theme.js";

const N = 12;
const WAIT_MS = 2000;
const SURFACE = "page";
const ONE = "this one act";
const LEGS = [["accepted", "accepted"], ["applied", "applied"], ["chosen", "chosen"], ["shown", "shown"]];

register({
  leg_accepted: { name: "Accepted", what: "From the click until the API had Kafka's word that the event is in the log.", unit: "ms", window: ONE, n: "1" },
  leg_applied: { name: "Applied", what: "From the request for the next slate until the profile that it reads holds the event (after=), as the server measured it.", unit: "ms", window: ONE, n: "1" },
  leg_chosen: { name: "Chosen", what: "Candidates found, ranked and drawn from, and the answer written, as the server measured it.", unit: "ms", window: ONE, n: "1" },
  leg_shown: { name: "Shown", what: "The rest: the way of the answer to this page, and drawing the tiles.", unit: "ms", window: ONE, n: "1" },
  leg_total: { name: "From click to new slate", what: "From the click in this browser until the next slate was painted.", unit: "ms", window: ONE, n: "1" },
});

// A small picture made from the item's id: three waves.
function art(id) {
  let seed = hue(id);
  const waves = [0, 1, 2].map((wave) => {
    seed = (seed * 7.13 + 53) % 360;
    const y = 20 + wave * 17 + (seed % 11);
    const bend = 7 + (seed % 17);
    return s("path", { d: `M0 ${y}C${40 + (seed % 31)} ${y - bend} ${110 + (seed % 37)} ${y + bend} 200 ${y - bend / 2}V80H0Z` });
  });
  return s("svg", { class: "art", viewBox: "0 0 200 80", preserveAspectRatio: "xMidYMid slice", "aria-hidden": "true" }, waves);
}

function random(length) {
  return [...crypto.getRandomValues(new Uint8Array(length))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Tell an event; where the server has too much to do it is told again, with the same id, and counts once.
async function tell(event, tries = 3) {
  try {
    return await post("/v1/events", [event]);
  } catch (error) {
    if (tries <= 1 || (error.status !== 429 && error.status !== 503)) throw error;
    await new Promise((done) => setTimeout(done, 1000));
    return tell(event, tries - 1);
  }
}

const painted = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));

export class Slate {
  constructor($) {
    this.$ = $;
    this.turn = Promise.resolve(); // acts follow each other: each is answered by the slate that knows the one before
    this.shown = new Map(); // item id -> its <li>
    this.learnt = new Learnt($("learnt"));
    this.detail = new Detail($("detail"), (item, event) => this.act(item, event));
  }

  start() {
    this.visitor = localStorage.getItem("freshet.visitor") ?? this.renew();
    say(this.$("visitor"), this.visitor);
    this.$("forget").addEventListener("click", () => this.forget());
    addEventListener("keydown", (event) => event.key === "Escape" && this.detail.close());
    addEventListener("pagehide", () => this.leave());
    define(this.$("timing-total"), "leg_total");
    this.load();
  }

  renew() {
    const id = `visitor-${random(4)}`;
    localStorage.setItem("freshet.visitor", id);
    return id;
  }

  forget() {
    this.detail.drop();
    this.visitor = this.renew();
    say(this.$("visitor"), this.visitor);
    this.$("timing").hidden = true;
    this.$("timing-hint").hidden = false;
    this.turn = this.turn.then(() => this.load());
  }

  fetchSlate(after) {
    const query = new URLSearchParams({ n: N, surface: SURFACE, trace: true });
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
      this.learnt.start(slate, await this.profile());
      if (slate.items.length < N) this.again = setTimeout(() => this.load(), 1500); // the catalogue is still coming in
    } catch (error) {
      this.empty(`No slate yet: ${error.message}`);
      this.again = setTimeout(() => this.load(), 2000);
    }
  }

  profile() {
    return ask(`/v1/users/${encodeURIComponent(this.visitor)}`);
  }

  empty(text) {
    say(this.$("empty"), text);
    this.$("empty").hidden = !text;
  }

  event(item, rest) {
    return { user_id: this.visitor, item_id: item.item_id, slate_id: item.slate_id, position: item.position, surface: SURFACE, ts: Date.now() / 1000, event_id: random(12), ...rest };
  }

  // What was read until the page is left: nobody waits for an answer.
  leave() {
    const open = this.detail.item;
    const seconds = this.detail.read();
    if (seconds) navigator.sendBeacon("/v1/events", new Blob([JSON.stringify([this.event(open, { type: "dwell", seconds })])], { type: "application/json" }));
  }

  open(item) {
    this.detail.open(item);
    this.act(item, { type: "click" });
  }

  act(item, rest) {
    clearTimeout(this.again);
    this.shown.get(item.item_id)?.classList.add("pressed");
    const began = performance.now();
    this.turn = this.turn.then(() => this.send(item, rest, began));
  }

  async send(item, rest, began) {
    const start = Math.max(began, this.finished ?? 0); // a click that waited for the one before is not that much slower
    try {
      const { token } = await tell(this.event(item, rest));
      const accepted = performance.now();
      const slate = await this.fetchSlate(token);
      const before = [...this.shown.keys()];
      this.draw(slate, true);
      await painted();
      this.finished = performance.now();
      this.time(start, accepted, this.finished, slate);
      this.learnt.tell({ item, rest, slate, before, profile: await this.profile(), visitor: this.visitor });
    } catch (error) {
      this.empty(`That did not arrive: ${error.message}. Try once more.`);
      this.shown.get(item.item_id)?.classList.remove("pressed");
    }
  }

  time(began, accepted, shown, { trace, applied, items }) {
    const stages = trace.ms;
    const spans = { accepted: accepted - began, applied: stages.profile, chosen: stages.recommend + stages.answer };
    spans.shown = Math.max(0, shown - began - spans.accepted - spans.applied - spans.chosen);
    this.$("timing").hidden = false;
    this.$("timing-hint").hidden = true;
    say(this.$("timing-total"), `${ms(shown - began)} ms`);
    this.$("path").replaceChildren(...LEGS.map(([key, name]) => {
      const leg = h("li", { class: `leg ${key}`, style: { "flex-grow": Math.max(0.12, spans[key] / (shown - began)) } }, h("i", {}), h("span", {}, name), " ", h("b", {}, `${ms(spans[key])} ms`));
      return define(leg, `leg_${key}`);
    }));
    const fresh = [...this.shown.values()].filter((tile) => tile.classList.contains("new")).length;
    const words = applied === false ? "It was not applied in time; the next slate will know it." : `${fresh} of ${items.length} are new`;
    say(this.$("changed"), words);
    say(this.$("said"), `New slate in ${ms(shown - began)} milliseconds. ${words}.`);
  }

  draw(slate, compare) {
    this.empty(slate.items.length ? "" : slate.reason || "Nothing to show yet.");
    const list = this.$("tiles");
    const focused = list.contains(document.activeElement) ? [...list.children].indexOf(document.activeElement.closest("li")) : -1;
    const before = new Map([...this.shown].map(([id, tile]) => [id, tile.getBoundingClientRect()]));
    const places = new Map([...this.shown.keys()].map((id, place) => [id, place]));
    const scored = new Map((slate.trace?.scores ?? []).map((score) => [score.id, score]));
    this.shown = new Map(slate.items.map((item, position) => {
      Object.assign(item, { position, slate_id: slate.slate_id, trace: scored.get(item.item_id), moved: compare && places.has(item.item_id) ? places.get(item.item_id) - position : 0 });
      return [item.item_id, this.tile(item, compare && !places.has(item.item_id))];
    }));
    list.replaceChildren(...this.shown.values());
    list.setAttribute("aria-busy", "false");
    if (focused >= 0) list.children[Math.min(focused, list.children.length - 1)]?.querySelector("button").focus({ preventScroll: true });
    if (compare && !calm()) this.animate(before);
  }

  // Tiles that stayed glide to their new place, new ones rise in.
  animate(before) {
    const ease = { duration: 420, easing: "cubic-bezier(.2,.7,.2,1)", fill: "backwards" };
    let k = 0;
    for (const [id, tile] of this.shown) {
      const old = before.get(id);
      const now = tile.getBoundingClientRect();
      if (old) tile.animate([{ transform: `translate(${old.left - now.left}px, ${old.top - now.top}px)` }, { transform: "none" }], ease);
      else tile.animate([{ opacity: 0, transform: "translateY(14px) scale(.97)" }, { opacity: 1, transform: "none" }], { ...ease, delay: 30 * k++ });
    }
  }

  tile(item, isNew) {
    const kind = item.categories?.[0] ?? "";
    const title = item.title || item.item_id;
    const news = isNew ? "new" : item.moved ? `${item.moved > 0 ? "↑" : "↓"}${Math.abs(item.moved)}` : "";
    const open = h("button", { class: "open", type: "button", onclick: () => this.open(item) },
      art(item.item_id),
      h("span", { class: "words" },
        h("span", { class: "kind" }, kind || `no. ${item.position + 1}`),
        h("span", { class: "title" }, title),
        h("span", { class: "why" }, why(item))));
    const badge = news && h("span", { class: "news" }, h("span", { class: "visually-hidden" }, isNew ? "" : `moved ${item.moved > 0 ? "up" : "down"} ${plural(Math.abs(item.moved), "place")}`), h("span", { "aria-hidden": isNew ? undefined : "true" }, news));
    const not = h("button", { class: "not", type: "button", title: "Not for me", "aria-label": `Not for me: ${title}`, onclick: () => this.act(item, { type: "action", name: "hide" }) }, "✕");
    return h("li", { class: `tile hued${isNew ? " new" : ""}`, style: { "--hue": hue(kind || item.item_id) } }, open, badge, not);
  }
}
