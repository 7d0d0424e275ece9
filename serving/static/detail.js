// The tile that is open: what it is, why it was shown, stars, what is like it; how long it is read is told when it closes.
import { ask } from "./ask.js";
import { h, say } from "./dom.js";
import { define, register } from "./figure.js";
import { number, percent } from "./format.js";
import { why } from "./learnt.js";
import { hue } from "./theme.js";

const LEAST_S = 3; // shorter reading says "not for me", and a tab that was changed would say it too: it is not told
const LIKED_S = 30;
const ALIKE = 4;
const ONE = "the slate it was opened from";

register({
  read: { name: "Reading time", what: "How long this was open while the page was seen. Told when it closes, from 3 s on; 30 s say that you liked it.", unit: "seconds", window: "since it was opened", n: "1" },
  score: { name: "Score", what: "The weighted sum that orders items: the ranker's log-odds of a click, and what the other heads add.", unit: "log-odds", window: ONE, n: "1" },
  probability: { name: "Probability", what: "How likely a shown item is chosen, calibrated on what other people did.", unit: "share", window: ONE, n: "1" },
});

export class Detail {
  constructor(place, act) {
    this.place = place;
    this.act = act;
    this.item = null;
    this.seconds = 0;
    this.since = null;
    document.addEventListener("visibilitychange", () => this.clock());
    setInterval(() => this.clock(), 1000);
  }

  open(item) {
    if (this.item) this.close();
    Object.assign(this, { item, seconds: 0, since: performance.now(), stars: 0 });
    this.draw();
    this.place.hidden = false;
    this.load(item);
  }

  clock() {
    if (!this.item) return;
    if (this.since !== null) this.seconds += (performance.now() - this.since) / 1000;
    this.since = document.hidden ? null : performance.now();
    const says = this.seconds >= LIKED_S ? "that says you like it" : this.seconds >= LEAST_S ? "told when it closes" : "counts from 3 s on";
    say(this.timer, `${number(this.seconds, 0)} s`);
    say(this.says, says);
  }

  // Seconds that were read and not yet told, 0 for too few.
  read() {
    this.clock();
    const seconds = this.item && this.seconds >= LEAST_S ? Math.round(10 * this.seconds) / 10 : 0;
    this.seconds = 0;
    return seconds;
  }

  close() {
    const { item } = this;
    const seconds = this.read();
    this.drop();
    if (seconds) this.act(item, { type: "dwell", seconds });
  }

  drop() {
    if (this.place.contains(document.activeElement)) document.getElementById("slate").focus({ preventScroll: true });
    this.item = null;
    this.place.hidden = true;
    this.place.replaceChildren();
  }

  draw() {
    const { item } = this;
    const { score, trace } = item;
    const kind = item.categories?.[0] ?? "";
    this.place.style.setProperty("--hue", hue(kind || item.item_id));
    this.place.classList.add("hued");
    this.timer = define(h("b", {}), "read");
    this.says = h("span", {});
    this.words = h("div", { class: "about" });
    this.alike = h("ul", { class: "alike" }, h("li", { class: "wait" }, "looking …"));
    const facts = [why(item), " · ", define(h("span", { class: "tabular" }, `score ${number(score, 2)}`), "score")];
    if (trace?.probability !== undefined) facts.push(" · ", define(h("span", { class: "tabular" }, `${percent(trace.probability)} likely chosen`), "probability"));
    this.place.replaceChildren(
      h("div", { class: "bar" }, h("span", { class: "kind" }, kind), h("button", { class: "quiet round", type: "button", "aria-label": "Close", title: "Close (Escape)", onclick: () => this.close() }, "✕")),
      h("h2", { id: "detail-title" }, item.title || item.item_id),
      this.words,
      h("p", { class: "reading" }, "reading for ", this.timer, " · ", this.says),
      h("div", { class: "acts" }, this.starRow(), h("button", { class: "quiet", type: "button", onclick: () => this.hide() }, "Not for me")),
      h("h3", {}, "Why it was here"),
      h("p", { class: "facts" }, ...facts),
      h("h3", {}, "Like this one"),
      this.alike,
      h("p", { class: "more" }, h("a", { href: `/dashboard#item/${encodeURIComponent(item.item_id)}` }, "What Freshet knows of this item")),
    );
    this.clock();
  }

  starRow() {
    const rate = (value) => {
      this.stars = value;
      this.rated.forEach((star, k) => star.setAttribute("aria-pressed", String(k < value)));
      this.act(this.item, { type: "rating", value, scale: [1, 5] });
    };
    this.rated = [1, 2, 3, 4, 5].map((value) => h("button", { class: "star", type: "button", "aria-label": `${value} of 5 stars`, "aria-pressed": "false", onclick: () => rate(value) }, "★"));
    return h("div", { class: "stars", role: "group", "aria-label": "Your stars" }, this.rated);
  }

  hide() {
    const { item } = this;
    this.drop();
    this.act(item, { type: "action", name: "hide" });
  }

  async load(item) {
    const id = encodeURIComponent(item.item_id);
    try {
      const [known, similar] = await Promise.all([ask(`/v1/items/${id}`), ask(`/v1/similar/${id}?n=${ALIKE}`)]);
      if (this.item !== item) return;
      const { text = "", tags = [], provider = "" } = known.catalogue ?? {};
      this.words.replaceChildren(h("p", {}, text || "The catalogue says nothing more of it."), h("p", { class: "tags" }, tags.map((tag) => h("span", { class: "chip" }, tag)), provider && h("span", { class: "chip" }, `by ${provider}`)));
      this.alike.replaceChildren(...similar.items.map((other) => h("li", {}, h("button", { type: "button", onclick: () => this.follow(other) }, h("span", { class: "dot hued", style: { "--hue": hue(other.categories?.[0] ?? other.item_id) } }), h("span", {}, other.title || other.item_id), h("small", {}, other.categories?.[0] ?? "")))));
      if (!similar.items.length) this.alike.replaceChildren(h("li", { class: "wait" }, "Nothing is known to be like it yet."));
    } catch (error) {
      if (this.item === item) this.alike.replaceChildren(h("li", { class: "wait" }, `Not to be had: ${error.message}`));
    }
  }

  // A similar item was opened: it belongs to no slate.
  follow(other) {
    const item = { ...other, reason: `Like ${this.item.title || this.item.item_id}`, channel: "similar" };
    this.open(item);
    this.act(item, { type: "click" });
  }
}
