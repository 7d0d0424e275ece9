// The shop front at /: figures of this moment, the visitor's slate, the crowd, and how good it is. It shows only what
// routes return.
import { spark, sparkline, TimeChart } from "./charts.js";
import { Crowd } from "./crowd.js";
import { define, figure, register } from "./figure.js";
import { ms, number, signed } from "./format.js";
import { Slate } from "./slate.js";
import { column, follow, latest, showStatus, times } from "./stream.js";
import { themeButton } from "./theme.js";

const $ = (id) => document.getElementById(id);
const SPARK_S = 120;
const SLATES = "simulated people's slates of the last 10 s";

register({
  events: { name: "Events applied", what: "Events folded into profiles: clicks, views, dwells, ratings, actions and the slates that were shown.", unit: "per second", window: "one second", n: "every event" },
  fresh: { name: "Freshness", what: "Median time from an event in the log to its profile in Redis.", unit: "ms", window: "one second" },
  lookups: { name: "Lookups", what: "Slates answered by this API process, and how long it took.", unit: "per second", window: "one second", n: "every lookup" },
  step: { name: "Model", what: "Steps the learner has taken, about one a second; the weights in use here are those of this step.", unit: "steps learnt", window: "since the start", n: "every outcome" },
  ours: { name: "Freshet", what: "Expected clicks of the slates we served: the chance that a position is looked at times the chance of a click there, summed.", unit: "clicks a slate", window: 10, n: SLATES },
  popular: { name: "Popularity", what: "Expected clicks of what /v1/popular answered the same people at the same moments.", unit: "clicks a slate", window: 10, n: SLATES },
  oracle: { name: "Best possible", what: "Expected clicks of the best slate there is, which only the simulated world knows.", unit: "clicks a slate", window: 10, n: SLATES },
  lead: { name: "Lead over popularity", what: "Freshet less popularity, paired by slate, with the 95 % interval of a bootstrap over people.", unit: "clicks a slate", window: 60, n: "simulated people's slates of that minute" },
});

const figures = Object.fromEntries(["events", "fresh", "lookups", "step"].map((key) => {
  const line = sparkline();
  const made = figure(key, { spark: line });
  made.classList.add("card");
  made.line = line;
  return [key, made];
}));
$("numbers").append(...Object.values(figures));

const curve = new TimeChart({
  title: "Expected clicks a slate", height: 260, format: (value) => number(value, 2),
  series: [{ label: "best possible", color: "oracle", def: "oracle", dash: [3, 5] }, { label: "Freshet", color: "ours", def: "ours", width: 2.5 }, { label: "popularity", color: "popular", def: "popular" }],
  empty: "No simulated people are here. Start some: freshet simulate",
});
$("curve").append(curve.root);
define($("lift-value"), "lead");

function draw() {
  const applied = latest((frame) => frame.users?.events);
  figures.events.set(number(applied), { note: `${number(latest((frame) => frame.users?.lag))} waiting, ${number(latest((frame) => frame.users?.dead) ?? 0)} dead letters` });
  figures.fresh.set(ms(latest((frame) => frame.users?.applied_p50_ms, 20)), { note: `99 % within ${ms(latest((frame) => frame.users?.applied_p99_ms, 20))} ms`, n: applied });
  const asked = latest((frame) => frame.api?.lookups_s);
  figures.lookups.set(number(asked), { note: asked ? `median ${ms(latest((frame) => frame.api?.lookup_p50_ms))} ms, 99 % within ${ms(latest((frame) => frame.api?.lookup_p99_ms))} ms` : "nobody asks" });
  figures.step.set(number(latest((frame) => frame.api?.step)), { note: `${number(latest((frame) => frame.api?.items))} items known` });
  spark(figures.events.line, column((frame) => frame.users?.events, SPARK_S));
  spark(figures.fresh.line, column((frame) => frame.users?.applied_p50_ms, SPARK_S));
  spark(figures.lookups.line, column((frame) => frame.api?.lookups_s, SPARK_S));
  spark(figures.step.line, column((frame) => frame.api?.step, SPARK_S), true);
  curve.draw(times(), ["oracle", "ours", "popular"].map((name) => column((frame) => frame.world?.[name])));
  drawLead(latest((frame) => frame.world?.lead_low !== undefined ? frame.world : null));
}

function drawLead(world) {
  $("lift").hidden = !world;
  if (!world) return;
  const { lead, lead_low: low, lead_high: high, lead_s: over } = world;
  $("lift").dataset.sign = low > 0 ? "up" : high < 0 ? "down" : "";
  $("lift-value").textContent = `${signed(lead, 2)} clicks a slate`;
  $("lift-range").textContent = `over popularity, last ${number(over, 0)} s; 95 % sure of ${number(low, 2)} to ${number(high, 2)}`;
}

themeButton($("theme"));
showStatus($("status"));
new Slate($).start();
const crowd = new Crowd($("crowd"));
follow(() => {
  draw();
  crowd.draw();
});
