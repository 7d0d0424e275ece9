// Time series over uPlot, with keyboard, a summary in words and a table; and sparklines. They know nothing of the pages.
import { h, s, say } from "./dom.js";
import { define } from "./figure.js";
import { clock, number } from "./format.js";
import { color, onTheme } from "./theme.js";

const uPlot = window.uPlot; // vendor/uPlot.iife.min.js, loaded before the modules
const MIN_SPAN_S = 60;
const TABLE_ROWS = 24;
const NEAR_PX = 6;
const BRIDGE_S = 12;

// 1, 2, 5, 10, ... within [low, high]; decades alone where there are many.
function decades(low, high) {
  const wide = Math.log10(high / low) > 2.2;
  const found = [];
  for (let ten = 10 ** Math.floor(Math.log10(low)); ten <= high; ten *= 10) found.push(...(wide ? [ten] : [ten, 2 * ten, 5 * ten]));
  return found.filter((value) => value >= low && value <= high);
}

// Without the zeros that end a fraction: an axis needs no more digits than its ticks.
function short(text) {
  return text.replace(/(\.\d*?)0+(?=\s|$)/, "$1").replace(/\.(?=\s|$)/, "");
}

// Short silences become undefined, over which uPlot draws on; longer ones stay null, where it breaks the line.
function bridged(times, values) {
  const made = values.slice();
  for (let k = 0, since = 0; k < made.length; k++) {
    if (made[k] === null) continue;
    if (times[k] - times[since] <= BRIDGE_S) for (let between = since + 1; between < k; between++) made[between] = undefined;
    since = k;
  }
  return made;
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

// A small <svg class="spark"> of one value a second, gaps allowed; from zero unless `rising`.
export function spark(svg, values, rising = false) {
  const points = values.map((value, k) => [k, value]).filter(([, value]) => finite(value));
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
  svg.append(s("path", { class: "area", d: `${path}L100 34L0 34Z` }), s("path", { d: path }));
}

export function sparkline() {
  return s("svg", { class: "spark", "aria-hidden": "true" });
}

/* A chart over time. `series`: [{label, color (token), def (of its number), dash, width}]; `format(value)` writes a value;
   `stacked` adds the series up as areas; `sync` moves the crosshair of all charts of that name together.
   `.draw(times (s), columns, marks [{t, text}], {window, n})`, `.close()`: n, or n(series), is the sample size, in words or a column. */
export class TimeChart {
  constructor({ title, series, format = number, height = 190, min = 0, max = null, log = false, stacked = false, sync = null, empty = "Not told yet." }) {
    Object.assign(this, { title, series, format, stacked, log, times: [], columns: [], marks: [], about: {}, at: null });
    this.values = series.map(() => h("b", {}, "–"));
    const keys = series.map((one, k) => {
      const key = h("li", { class: one.dash ? "dashed" : stacked ? "area" : "", style: { "--key": `var(--${one.color})` } }, h("i", { "aria-hidden": "true" }), one.label, this.values[k]);
      return one.def ? define(key, one.def) : key;
    });
    this.keys = h("ul", { class: "keys" }, keys);
    this.canvas = h("div", { class: "canvas", role: "img", tabindex: "0", "aria-label": title, onkeydown: (event) => this.key(event), onblur: () => this.leave() });
    this.canvas.style.minHeight = `${height}px`;
    this.nothing = h("p", { class: "empty" }, empty);
    this.when = h("span", {});
    this.button = h("button", { class: "as-table", type: "button", "aria-expanded": "false", onclick: () => this.toggle() }, "as a table");
    this.button.setAttribute("aria-label", `${title}: show as a table`);
    this.rows = h("div", { class: "rows table", hidden: true, tabindex: "0", role: "region", "aria-label": `${title}, as a table` });
    this.root = h("figure", { class: "plot" }, this.keys, this.nothing, this.canvas, h("div", { class: "at" }, this.when, this.button), this.rows);
    this.options = { height, min, max, sync };
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(this.canvas);
    this.unTheme = onTheme(() => this.plot?.redraw(false));
    this.show(false);
  }

  show(some) {
    for (const part of [this.canvas, this.keys, this.button]) part.hidden = !some;
    this.nothing.hidden = some;
  }

  make(width) {
    const { height, min, max, sync } = this.options;
    const axis = { stroke: () => color("faint"), font: "11px system-ui, sans-serif", ticks: { show: false }, gap: 6 };
    const grid = { stroke: () => color("line"), width: 1 };
    const lines = this.series.map((one) => ({
      label: one.label, stroke: () => color(one.color), width: one.width ?? (this.stacked ? 0 : 1.75), dash: one.dash, points: { show: false },
      fill: this.stacked ? () => color(one.color, 0.8) : undefined,
    }));
    const range = (_, low, high) => {
      if (this.log) return [Math.max(1e-6, low / 1.3), high * 1.3];
      const top = max ?? (high > 0 ? high * 1.08 : 1);
      const bottom = min ?? low - Math.max(1e-9, (high - low) * 0.1);
      return [bottom, top > bottom ? top : bottom + 1];
    };
    this.plot = new uPlot({
      width, height, padding: [8, 18, 0, 0], legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false, points: { size: 6 }, sync: sync ? { key: sync, setSeries: false, scales: ["x", null] } : undefined },
      scales: { x: { time: true, range: (_, low, high) => [Math.min(low, high - MIN_SPAN_S), high] }, y: { distr: this.log ? 3 : 1, range } },
      axes: [
        { ...axis, size: 24, space: (_, __, low, high, width) => (width < 360 ? 50 : 70), grid: { show: false }, values: (_, at) => at.map((t, k) => (k && at[k] - at[k - 1] < 60 ? clock(t) : clock(t).slice(0, 5))) },
        { ...axis, size: 46, space: 34, grid, ...(this.log ? { splits: (_, __, low, high) => decades(low, high), filter: (_, at) => at } : {}), values: (_, at) => at.map((value) => (value === null ? "" : short(this.format(value)))) },
      ],
      series: [{}, ...lines],
      bands: this.stacked ? this.series.slice(1).map((_, k) => ({ series: [k + 2, k + 1] })) : undefined,
      hooks: { setCursor: [(plot) => this.point(plot.cursor.idx)], draw: [(plot) => this.drawMarks(plot)] },
    }, this.data(), this.canvas);
  }

  data() {
    if (!this.stacked) return [this.times, ...this.columns.map((values) => bridged(this.times, values))];
    const sums = new Array(this.times.length).fill(0);
    return [this.times, ...this.columns.map((values) => values.map((value, k) => (sums[k] += value ?? 0)))];
  }

  draw(times, columns, marks = [], about = {}) {
    Object.assign(this, { times, columns, marks, about });
    const some = columns.some((values) => values.some(finite));
    this.show(some);
    if (!some) return;
    const width = Math.floor(this.canvas.clientWidth);
    if (width < 80) return;
    if (this.plot) this.plot.setData(this.data());
    else this.make(width);
    if (this.at === null) this.tell(null);
    say(this.when, this.at === null ? "" : this.when.textContent);
    this.canvas.setAttribute("aria-label", this.summary());
    if (!this.rows.hidden && Math.floor(Date.now() / 1000) % 5 === 0) this.table();
  }

  last(values) {
    for (let k = values.length - 1; k >= 0; k--) if (finite(values[k])) return values[k];
    return null;
  }

  summary() {
    const parts = this.series.map((one, k) => {
      const told = this.columns[k].filter(finite);
      return told.length ? `${one.label} ${this.format(told[told.length - 1])}, between ${this.format(Math.min(...told))} and ${this.format(Math.max(...told))}` : `${one.label} not told yet`;
    });
    const alarms = this.marks.length ? ` ${this.marks.length} marked moments, the last at ${clock(this.marks[this.marks.length - 1].t)}.` : "";
    return `${this.title}. ${parts.join("; ")}.${alarms} Arrow keys read single moments.`;
  }

  point(index) {
    if (index === null || index === undefined || !this.times.length) {
      if (this.at !== null) this.tell(null);
      return;
    }
    this.tell(Math.min(index, this.times.length - 1));
  }

  tell(index) {
    this.at = index;
    this.series.forEach((one, k) => {
      say(this.values[k], this.format(index === null ? this.last(this.columns[k]) : this.columns[k][index]));
      if (one.def) define(this.values[k].parentNode, one.def, this.sample(k, index));
    });
    if (index === null) return say(this.when, "");
    const near = this.plot ? this.marks.filter(({ t }) => Math.abs(this.plot.valToPos(t, "x") - this.plot.valToPos(this.times[index], "x")) < NEAR_PX) : [];
    say(this.when, `at ${clock(this.times[index])}${near.map(({ text }) => ` · ${text}`).join("")}`);
  }

  // Window and sample size of the number that stands in key `k`.
  sample(k, index) {
    const { window, n } = this.about;
    const sizes = typeof n === "function" ? n(k) : n;
    return { window, n: !Array.isArray(sizes) ? sizes : index === null ? sizes.findLast((size) => size !== null) : sizes[index] };
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.plot || !this.times.length) return;
    event.preventDefault();
    this.when.setAttribute("aria-live", "polite");
    const index = Math.max(0, Math.min(this.times.length - 1, (this.at ?? this.times.length - 1) + step * (event.shiftKey ? 10 : 1)));
    this.plot.setCursor({ left: this.plot.valToPos(this.times[index], "x"), top: 4 });
    this.tell(index);
    const told = this.series.map((one, k) => `${one.label} ${this.values[k].textContent}`).join(", ");
    say(this.when, `${this.when.textContent}: ${told}`);
  }

  leave() {
    this.when.removeAttribute("aria-live");
    this.plot?.setCursor({ left: -10, top: -10 });
    this.tell(null);
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = color("bad");
    ctx.lineWidth = ratio;
    for (const { t } of this.marks) {
      const x = Math.round(plot.valToPos(t, "x", true)) + 0.5;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.beginPath();
      ctx.moveTo(x - 4 * ratio, bbox.top - 2 * ratio);
      ctx.lineTo(x + 4 * ratio, bbox.top - 2 * ratio);
      ctx.lineTo(x, bbox.top + 5 * ratio);
      ctx.fill();
    }
    ctx.restore();
  }

  toggle() {
    const open = this.rows.hidden;
    this.rows.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    say(this.button, open ? "hide the table" : "as a table");
    if (open) this.table();
  }

  table() {
    const step = Math.max(1, Math.ceil(this.times.length / TABLE_ROWS));
    const body = [];
    for (let k = this.times.length - 1; k >= 0 && body.length < TABLE_ROWS; k -= step) {
      body.push(h("tr", {}, h("td", {}, clock(this.times[k])), this.columns.map((values) => h("td", { class: "num" }, this.format(values[k])))));
    }
    const head = h("tr", {}, h("th", { scope: "col" }, "time"), this.series.map((one) => h("th", { scope: "col", class: "num" }, one.label)));
    this.rows.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
  }

  resize() {
    const width = Math.floor(this.canvas.clientWidth);
    if (this.plot && width >= 80 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
    else if (!this.plot && width >= 80 && this.times.length) this.draw(this.times, this.columns, this.marks, this.about);
  }

  close() {
    this.watch.disconnect();
    this.unTheme();
    this.plot?.destroy();
    this.plot = null;
  }
}
