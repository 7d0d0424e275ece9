// The map: items as points coloured by topic, and one user as two points that move among them. A canvas, with words.
import { glide } from "./cards.js";
import { h } from "./dom.js";
import { color, dot, hue, onTheme } from "./theme.js";

const TRAIL = 90;
const TOPICS = 14;
const HIT_PX = 12;
const PAD = 18;
const FADE_S = 5; // what only fades is painted again this often

/* `.items(list)` and `.user({hour, month, entries})` set what is drawn, gliding from what was; `pick(item)` is called where
   an item is chosen. `.nearest(point, n)` tells the items nearest to a point, for words beside the picture. */
export class Atlas {
  constructor({ pick, height = Math.min(560, innerWidth) }) {
    Object.assign(this, { pick, height, points: [], where: new Map(), hour: null, month: null, entries: [], trail: [], topic: null, hovered: null, stops: [] });
    this.canvas = h("canvas", { role: "img", "aria-label": "Map of items", onpointermove: (event) => this.hover(event), onpointerleave: () => this.leave(), onclick: () => this.hovered && this.pick(this.hovered) });
    this.canvas.style.height = `${height}px`;
    this.tip = h("div", { class: "map-tip", hidden: true, "aria-hidden": "true" });
    this.legend = h("div", { class: "topics", role: "group", "aria-label": "Topics of the map" });
    this.root = h("div", { class: "atlas" }, h("div", { class: "sheet" }, this.canvas, this.tip), this.legend);
    this.watch = new ResizeObserver(() => this.paint());
    this.watch.observe(this.canvas);
    this.unTheme = onTheme(() => {
      this.legend.dataset.names = "";
      this.showTopics();
      this.paint();
    });
  }

  items(list) {
    const from = this.where;
    const first = from.size === 0;
    this.points = list;
    this.stops.push(glide(first ? 0 : 1, (share) => {
      this.where = new Map(list.map((item) => {
        const old = from.get(item.item_id);
        return [item.item_id, old ? [old[0] + (item.x - old[0]) * share, old[1] + (item.y - old[1]) * share] : [item.x, item.y]];
      }));
      this.paint();
    }));
    this.stops.splice(0, this.stops.length - 4);
    this.showTopics();
  }

  user({ hour, month, entries }) {
    const from = { hour: this.hour, month: this.month };
    this.entries = entries;
    this.root.dataset.user = hour ? `${hour.x} ${hour.y}` : ""; // where the point is, for who cannot read a canvas
    const still = (old, now) => old === now || (old && now && !moved(old, now));
    const moved = (old, now) => old && now && Math.hypot(old.x - now.x, old.y - now.y) > 1e-6;
    if (hour && (!this.hour || moved(this.hour, hour))) this.trail = [...this.trail, { x: hour.x, y: hour.y }].slice(-TRAIL);
    if (still(from.hour, hour) && still(from.month, month) && performance.now() - this.painted < 1000 * FADE_S) return;
    this.stops.push(glide(moved(from.hour, hour) || moved(from.month, month) ? 0.5 : 0, (share) => {
      const between = (old, now) => (old && now ? { x: old.x + (now.x - old.x) * share, y: old.y + (now.y - old.y) * share } : now);
      this.hour = between(from.hour, hour);
      this.month = between(from.month, month);
      this.paint();
    }));
    this.stops.splice(0, this.stops.length - 4);
  }

  describe(words) {
    this.canvas.setAttribute("aria-label", words);
  }

  nearest(point, n) {
    const away = (item) => Math.hypot(item.x - point.x, item.y - point.y);
    return this.points.toSorted((a, b) => away(a) - away(b)).slice(0, n);
  }

  showTopics() {
    const counts = new Map();
    for (const { category } of this.points) counts.set(category || "", (counts.get(category || "") ?? 0) + 1);
    const names = [...counts].sort((a, b) => b[1] - a[1]).slice(0, TOPICS).map(([name]) => name).sort();
    if (this.legend.dataset.names === names.join("|")) return;
    this.legend.dataset.names = names.join("|");
    this.legend.replaceChildren(...names.map((name) => h("button", { class: "chip hued", type: "button", "aria-pressed": "false", style: { "--hue": hue(name) }, onclick: (event) => this.light(name, event.currentTarget) }, h("i", { "aria-hidden": "true", style: { background: dot(name) } }), name || "no topic")));
  }

  light(name, button) {
    this.topic = this.topic === name ? null : name;
    for (const one of this.legend.children) one.setAttribute("aria-pressed", String(one === button && this.topic !== null));
    this.paint();
  }

  place({ x, y }) {
    const { width } = this;
    return [PAD + ((Math.max(-1.15, Math.min(1.15, x)) + 1.15) / 2.3) * (width - 2 * PAD), PAD + ((1.15 - Math.max(-1.15, Math.min(1.15, y))) / 2.3) * (this.height - 2 * PAD)];
  }

  paint() {
    this.width = this.canvas.clientWidth;
    if (!this.width) return;
    const ratio = devicePixelRatio;
    if (this.canvas.width !== Math.round(this.width * ratio)) {
      this.canvas.width = Math.round(this.width * ratio);
      this.canvas.height = Math.round(this.height * ratio);
    }
    this.painted = performance.now();
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    const most = Math.max(1, ...this.points.map((item) => item.shown));
    this.spots = this.points.map((item) => {
      const at = this.where.get(item.item_id);
      const [x, y] = this.place(at ? { x: at[0], y: at[1] } : item);
      return { item, x, y, r: 2 + 4 * Math.sqrt(item.shown / most) };
    });
    for (const { item, x, y, r } of this.spots) {
      const lit = this.topic === null || this.topic === (item.category || "");
      pen.fillStyle = dot(item.category || "", lit ? 0.72 : 0.1);
      pen.beginPath();
      pen.arc(x, y, r, 0, 7);
      pen.fill();
    }
    if (this.hour) this.paintUser(pen);
    if (this.hovered) this.ring(pen, this.hovered);
  }

  paintUser(pen) {
    const [hx, hy] = this.place(this.hour);
    pen.lineCap = "round";
    for (const entry of this.entries) {
      if (entry.decay["1h"] < 0.02) continue;
      const [x, y] = this.place(entry);
      pen.strokeStyle = color("ink", 0.08 + 0.4 * entry.decay["1h"]);
      pen.lineWidth = 0.5 + 2 * entry.decay["1h"];
      pen.beginPath();
      pen.moveTo(x, y);
      pen.lineTo(hx, hy);
      pen.stroke();
      pen.strokeStyle = color("ink", 0.35 + 0.6 * entry.decay["1h"]);
      pen.lineWidth = 1.25;
      pen.beginPath();
      pen.arc(x, y, 5.5, 0, 7);
      pen.stroke();
    }
    this.trail.forEach((point, k) => {
      if (!k) return;
      const [x0, y0] = this.place(this.trail[k - 1]);
      const [x1, y1] = this.place(point);
      pen.strokeStyle = color("accent", 0.15 + (0.75 * k) / this.trail.length);
      pen.lineWidth = 2.5;
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.lineTo(x1, y1);
      pen.stroke();
    });
    if (this.month) {
      const [x, y] = this.place(this.month);
      this.blob(pen, x, y, color("card"), color("accent"), 7, 3);
    }
    this.blob(pen, hx, hy, color("accent"), color("card"), 8, 2.5);
  }

  blob(pen, x, y, fill, edge, r, line) {
    pen.beginPath();
    pen.arc(x, y, r + 1.5, 0, 7);
    pen.fillStyle = color("card");
    pen.fill();
    pen.beginPath();
    pen.arc(x, y, r, 0, 7);
    pen.fillStyle = fill;
    pen.fill();
    pen.lineWidth = line;
    pen.strokeStyle = edge;
    pen.stroke();
  }

  ring(pen, item) {
    const spot = this.spots.find((one) => one.item.item_id === item.item_id);
    if (!spot) return;
    pen.strokeStyle = color("ink");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(spot.x, spot.y, spot.r + 3, 0, 7);
    pen.stroke();
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    for (const spot of this.spots ?? []) {
      const away = Math.hypot(spot.x - x, spot.y - y);
      if (away < HIT_PX && (!best || away < best.away)) best = { away, spot };
    }
    this.hovered = best?.spot.item ?? null;
    this.tip.hidden = !best;
    this.canvas.style.cursor = best ? "pointer" : "default";
    if (best) {
      const { item, x: left, y: top } = best.spot;
      this.tip.replaceChildren(h("b", {}, item.title || item.item_id), h("span", {}, `${item.category || "no topic"} · shown by ${item.shown} slates`));
      this.tip.style.left = `${Math.min(left + 12, this.width - this.tip.offsetWidth - 4)}px`;
      this.tip.style.top = `${top + 14 + this.tip.offsetHeight > this.height ? top - this.tip.offsetHeight - 10 : top + 14}px`;
    }
    this.paint();
  }

  leave() {
    this.hovered = null;
    this.tip.hidden = true;
    this.paint();
  }

  close() {
    this.watch.disconnect();
    this.unTheme();
    for (const stop of this.stops) stop();
  }
}
