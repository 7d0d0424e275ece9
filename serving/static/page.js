// The page at /: the live numbers, the chart and the visitor's slate. It shows only what routes return.
import { Curve, spark } from "/static/chart.js";
import { Slate } from "/static/slate.js";

const $ = (id) => document.getElementById(id);
const KEEP = 900; // seconds of history, as many as the server keeps
const frames = [];
const curve = new Curve($("chart"));
let waiting = false;

function number(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function ms(value) {
  return number(value, value < 10 ? 1 : 0);
}

function state(name, text) {
  $("status").dataset.state = name;
  $("status-text").textContent = text;
}

function latest(read, within = 6) {
  for (let k = frames.length - 1; k >= Math.max(0, frames.length - within); k--) {
    const value = read(frames[k]);
    if (value !== null && value !== undefined) return value;
  }
  return null;
}

function draw() {
  waiting = false;
  const last = frames[frames.length - 1];
  if (!last) return;
  const recent = frames.slice(-90);
  $("events").textContent = number(latest((f) => f.users?.events));
  $("fresh").textContent = ms(latest((f) => f.users?.applied_p50_ms, 20));
  const p99 = latest((f) => f.users?.applied_p99_ms, 20);
  $("fresh-foot").textContent = p99 === null ? "from event to applied profile" : `event to applied profile; 99 % within ${ms(p99)} ms`;
  const lag = latest((f) => f.users?.lag);
  const dead = latest((f) => f.users?.dead);
  $("events-foot").textContent = lag === null ? "waiting for the first event" : `${number(lag)} waiting, ${number(dead ?? 0)} dead letters`;
  $("lookups").textContent = number(latest((f) => f.api?.lookups_s));
  const wait = latest((f) => f.api?.lookup_p50_ms);
  $("lookups-foot").textContent = wait === null ? "slates drawn for people" : `median ${ms(wait)} ms, 99 % within ${ms(latest((f) => f.api?.lookup_p99_ms))} ms`;
  $("step").textContent = number(latest((f) => f.api?.step));
  const items = latest((f) => f.api?.items);
  $("step-foot").textContent = items === null ? "weights follow within a second or two" : `${number(items)} items known`;
  spark($("events-spark"), recent.map((f) => f.users?.events));
  spark($("fresh-spark"), recent.map((f) => f.users?.applied_p50_ms));
  spark($("lookups-spark"), recent.map((f) => f.api?.lookups_s));
  spark($("step-spark"), recent.map((f) => f.api?.step), true);
  drawWorld();
  if (last.api?.degraded) state("lost", "degraded: Redis does not answer");
  else state("live", "live");
}

function drawWorld() {
  const points = frames.filter((f) => f.world && Number.isFinite(f.world.ours)).map((f) => ({ t: f.t, ...f.world }));
  $("no-world").hidden = points.length > 0;
  $("chart").hidden = points.length === 0;
  if (!points.length) {
    $("lift").hidden = true;
    return;
  }
  curve.draw(points);
  const { lead, lead_low: low, lead_high: high, lead_s: over } = points[points.length - 1];
  $("lift").hidden = !Number.isFinite(lead) || !Number.isFinite(low);
  $("lift").dataset.sign = low > 0 ? "up" : high < 0 ? "down" : "";
  $("lift-value").textContent = `${lead >= 0 ? "+" : "−"}${number(Math.abs(lead), 2)} clicks a slate`;
  $("lift-range").textContent = `over popularity, last ${number(over)} s; 95 % sure of ${number(low, 2)} to ${number(high, 2)}`;
}

function listen() {
  const source = new EventSource("/-/live");
  source.onopen = () => state("live", "live");
  source.onmessage = (message) => {
    const frame = JSON.parse(message.data);
    if (frames.length && frame.t <= frames[frames.length - 1].t) return;
    frames.push(frame);
    if (frames.length > KEEP) frames.shift();
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(draw);
    }
  };
  source.onerror = () => {
    state("lost", source.readyState === EventSource.CLOSED ? "the server refused; trying again" : "connection lost; trying again");
    if (source.readyState === EventSource.CLOSED) {
      source.close();
      setTimeout(listen, 3000);
    }
  };
}

function theme() {
  const root = document.documentElement;
  const saved = localStorage.getItem("freshet.theme");
  if (saved) root.dataset.theme = saved;
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("freshet.theme", root.dataset.theme);
  });
}

theme();
listen();
new Slate($).start();
new ResizeObserver(() => drawWorld()).observe($("chart"));
