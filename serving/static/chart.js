// Two small charts drawn by hand as SVG: a sparkline, and the curve of expected clicks. They know nothing of the page.
const NS = "http://www.w3.org/2000/svg";

function node(name, attributes = {}, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function finite(values) {
  return values.map((value, k) => [k, value]).filter(([, value]) => Number.isFinite(value));
}

// Draw `values` (one a second, gaps allowed) into an <svg>; from zero unless `rising`.
export function spark(svg, values, rising = false) {
  const points = finite(values);
  svg.replaceChildren();
  if (points.length < 2) return;
  const heights = points.map(([, value]) => value);
  const low = rising ? Math.min(...heights) : 0;
  const high = Math.max(...heights, low + 1e-9);
  const first = points[0][0];
  const width = Math.max(1, points[points.length - 1][0] - first);
  svg.setAttribute("viewBox", "0 0 100 34");
  svg.setAttribute("preserveAspectRatio", "none");
  const path = points.map(([k, value], n) => `${n ? "L" : "M"}${(((k - first) / width) * 100).toFixed(2)} ${(32 - ((value - low) / (high - low)) * 29).toFixed(2)}`).join("");
  svg.append(node("path", { class: "area", d: `${path}L100 34L0 34Z` }), node("path", { d: path }));
}

function ticks(high) {
  const step = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2].find((size) => high / size <= 5) ?? 5;
  const made = [];
  for (let value = 0; value <= high + 1e-9; value += step) made.push([value, step < 0.1 || step === 0.25 ? 2 : 1]);
  return made;
}

function clock(seconds) {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

const LINES = [
  ["oracle", "best possible"],
  ["popular", "popularity"],
  ["ours", "Freshet"],
];

// Expected clicks over time: three lines, labelled at their ends, with a crosshair for pointer and arrow keys.
export class Curve {
  constructor(place) {
    this.place = place;
    this.points = [];
    this.at = null;
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    this.svg = node("svg", { "aria-hidden": "true" });
    place.append(this.svg, this.tip);
    place.addEventListener("pointermove", (event) => this.point(event.clientX));
    place.addEventListener("pointerleave", () => this.leave());
    place.addEventListener("blur", () => this.leave());
    place.addEventListener("keydown", (event) => this.key(event));
  }

  draw(points) {
    this.points = points;
    const box = this.place.getBoundingClientRect();
    if (box.width < 60) return;
    const frame = (this.frame = { left: 34, right: box.width - 88, top: 12, bottom: box.height - 26 });
    const start = points[0].t;
    const span = Math.max(20, points[points.length - 1].t - start);
    const high = Math.max(0.5, ...points.map((point) => Math.max(point.oracle, point.ours, point.popular))) * 1.06;
    this.x = (t) => frame.left + ((t - start) / span) * (frame.right - frame.left);
    this.y = (value) => frame.bottom - (value / high) * (frame.bottom - frame.top);
    this.svg.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
    this.svg.replaceChildren(...this.axes(high, start, span), ...this.lines(), ...this.labels());
    this.say();
    if (this.at !== null) this.show(Math.min(this.at, points.length - 1));
  }

  axes(high, start, span) {
    const { left, right, bottom } = this.frame;
    const made = [];
    for (const [value, digits] of ticks(high)) {
      const y = Math.round(this.y(value)) + 0.5;
      made.push(node("line", { class: "grid", x1: left, x2: right, y1: y, y2: y }));
      made.push(node("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, value.toFixed(digits)));
    }
    const step = [5, 10, 15, 30, 60, 120, 300].find((size) => span / size <= Math.max(3, (right - left) / 90)) ?? 600;
    for (let seconds = 0; seconds <= span; seconds += step) {
      const x = this.x(start + seconds);
      made.push(node("text", { x, y: bottom + 19, "text-anchor": seconds ? "middle" : "start" }, clock(seconds)));
    }
    return made;
  }

  path(name) {
    return this.points.map((point, k) => `${k ? "L" : "M"}${this.x(point.t).toFixed(1)} ${this.y(point[name]).toFixed(1)}`).join("");
  }

  lines() {
    const back = [...this.points].reverse();
    const between = this.path("ours") + back.map((point) => `L${this.x(point.t).toFixed(1)} ${this.y(point.popular).toFixed(1)}`).join("") + "Z";
    return [node("path", { class: "gap", d: between }), ...LINES.map(([name]) => node("path", { class: `line ${name}`, d: this.path(name) }))];
  }

  labels() {
    const last = this.points[this.points.length - 1];
    const placed = LINES.map(([name, text]) => ({ name, text, value: last[name], y: this.y(last[name]) })).sort((a, b) => a.y - b.y);
    for (let k = 1; k < placed.length; k++) placed[k].y = Math.max(placed[k].y, placed[k - 1].y + 31);
    const over = placed[placed.length - 1].y - (this.frame.bottom - 10);
    if (over > 0) for (const label of placed) label.y -= over;
    return placed.flatMap(({ name, text, value, y }) => [
      node("text", { class: `end ${name}`, x: this.frame.right + 8, y: y + 1 }, value.toFixed(2)),
      node("text", { x: this.frame.right + 8, y: y + 15 }, text),
    ]);
  }

  say() {
    const last = this.points[this.points.length - 1];
    const text = `Expected clicks per slate: Freshet ${last.ours.toFixed(2)}, popularity ${last.popular.toFixed(2)}, best possible ${last.oracle.toFixed(2)}`;
    this.place.setAttribute("aria-label", text);
  }

  point(clientX) {
    if (!this.points.length) return;
    const x = clientX - this.place.getBoundingClientRect().left;
    let best = 0;
    for (let k = 1; k < this.points.length; k++) {
      if (Math.abs(this.x(this.points[k].t) - x) < Math.abs(this.x(this.points[best].t) - x)) best = k;
    }
    this.show(best);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.points.length) return;
    event.preventDefault();
    const from = this.at ?? this.points.length - 1;
    this.show(Math.max(0, Math.min(this.points.length - 1, from + step * (event.shiftKey ? 10 : 1))));
  }

  show(k) {
    this.at = k;
    const point = this.points[k];
    const x = this.x(point.t);
    this.svg.querySelector(".cross")?.remove();
    this.svg.append(node("line", { class: "cross", x1: x, x2: x, y1: this.frame.top, y2: this.frame.bottom }));
    this.tip.replaceChildren();
    for (const text of [`at ${clock(point.t - this.points[0].t)}`, `Freshet ${point.ours.toFixed(2)}`, `popularity ${point.popular.toFixed(2)}`, `best ${point.oracle.toFixed(2)}`]) {
      const line = document.createElement("div");
      line.textContent = text;
      this.tip.append(line);
    }
    this.tip.hidden = false;
    const room = this.place.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(0, x + 12 > room ? x - this.tip.offsetWidth - 12 : x + 12)}px`;
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    this.svg.querySelector(".cross")?.remove();
  }
}
