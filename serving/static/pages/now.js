// Now: what comes in, how fresh it is, what is asked for, what waits and what broke.
import { bars, card, empty } from "../cards.js";
import { TimeChart, spark, sparkline } from "../charts.js";
import { h } from "../dom.js";
import { figure } from "../figure.js";
import { ago, clock, ms, number, plural } from "../format.js";
import { column, latest, times, total, watch } from "../stream.js";

export const title = "Now";
export const lead = "Events in, profiles changed, slates out: this second and the last five minutes.";
export const json = ["/-/live", "/-/state", "/metrics"];

const TYPES = [["impression", "s7"], ["view", "s4"], ["click", "s1"], ["dwell", "s3"], ["rating", "s2"], ["action", "s5"]];
const STAGES = [["profile", "read the profile"], ["recommend", "retrieve, rank, draw"], ["answer", "write the answer"], ["lookup", "whole lookup"]];
const SPARK_S = 120;
const NEWS = 40;
const SHOWN_S = 300;

const QUANTILES = [["50", "median", "s1"], ["95", "95 %", "s3"], ["99", "99 %", "s2"]];

function quantiles(prefix) {
  return QUANTILES.map(([q, label, color]) => ({ label, color, def: `${prefix}_p${q}_ms` }));
}

export function open(root, { signal }) {
  const sparks = { events: sparkline(), applied: sparkline(), changed: sparkline(), lookups: sparkline(), lookup: sparkline(), lag: sparkline() };
  const figures = {
    events: figure("events", { spark: sparks.events }),
    applied: figure("applied_p50_ms", { spark: sparks.applied }),
    changed: figure("changed_p50_ms", { spark: sparks.changed }),
    lookups: figure("lookups_s", { spark: sparks.lookups }),
    lookup: figure("lookup_p50_ms", { spark: sparks.lookup }),
    lag: figure("lag", { spark: sparks.lag }),
  };
  const byType = new TimeChart({ title: "Events applied per second, by type", stacked: true, height: 230, series: TYPES.map(([name, color]) => ({ label: name, color, def: `events_${name}` })), empty: "No events yet. Start some people: freshet simulate, or click in the shop front." });
  const applied = new TimeChart({ title: "Event to applied profile, ms", log: true, format: ms, series: quantiles("applied"), empty: "Nothing was applied yet." });
  const changed = new TimeChart({ title: "Event to changed slate, ms", log: true, format: ms, series: quantiles("changed"), empty: "Nobody asked for a slate with after= yet. Click a tile in the shop front: it does." });
  const lookups = new TimeChart({ title: "Lookup latency, ms", log: true, format: ms, series: quantiles("lookup"), empty: "No slates asked for yet." });
  const lag = bars("Events waiting, by partition of the log", "lag_partition", { head: ["partition", "waiting"] });
  const stages = bars("Latency of a lookup, by stage", "stage_p50_ms", { head: ["stage", "median (99 %)"] });
  const state = h("p", { class: "notice", role: "status" }, "Waiting for the first second.");
  const news = h("ul", { class: "news", tabindex: "0", "aria-label": "What broke last" });
  const quiet = empty("Nothing broke of late.", "Errors, dead letters, refused versions, degradations and drift alarms appear here with their time.");
  const noLag = empty("Not told yet.", "Lag is told while events come.");
  const noStages = empty("No lookups in the last minute.", "Stages appear as soon as somebody asks for a slate.");
  root.append(
    h("section", { class: "card figures six", "aria-label": "This second" }, Object.values(figures)),
    card("Events applied", { width: "two-thirds" }, byType.root),
    card("State", { width: "third" }, state, h("h3", { class: "visually-hidden" }, "What broke last"), quiet, news),
    card("Event to applied profile", { width: "third", lead: "From acceptance of an event to its commit in Redis." }, applied.root),
    card("Event to changed slate", { width: "third", lead: "From acceptance of an event to the first answer drawn with it." }, changed.root),
    card("Lookups", { width: "third", lead: "From request to answer, in this API process." }, lookups.root),
    card("Waiting, by partition", { width: "half" }, noLag, lag),
    card("A lookup, by stage", { width: "half" }, noStages, stages),
  );
  signal.addEventListener("abort", () => [byType, applied, changed, lookups].forEach((chart) => chart.close()));

  signal.addEventListener("abort", watch(({ name }) => {
    if (name !== "lost" && name !== "refused") return;
    state.className = "notice";
    state.textContent = "Not known while the API does not answer.";
  }));

  const percentiles = (prefix, part) => QUANTILES.map(([q]) => column((f) => f[part]?.[`${prefix}_p${q}_ms`], SHOWN_S));
  const broke = [];
  let told = 0;

  function list(frames) {
    for (const frame of frames) {
      for (const one of frame.broke ?? []) if (!broke.some((old) => old.t === one.t && old.what === one.what)) broke.unshift(one);
    }
    broke.sort((a, b) => b.t - a.t);
    broke.length = Math.min(broke.length, NEWS);
    quiet.hidden = broke.length > 0;
    news.hidden = broke.length === 0;
    news.replaceChildren(...broke.map(({ t, what }) => h("li", {}, h("time", { datetime: new Date(t * 1000).toISOString(), title: ago(t) }, clock(t)), h("span", {}, what))));
  }

  return (last) => {
    const fresh = freshFrames(told);
    if (fresh.length) list(fresh);
    told = last.t;
    const at = times(SHOWN_S);
    const events = latest((f) => f.users?.events);
    figures.events.set(number(events), { note: `${number(total((f) => f.users?.events, 60))} in the last minute`, n: events });
    const applied50 = latest((f) => f.users?.applied_p50_ms, 20);
    figures.applied.set(ms(applied50), { note: `95 % ${ms(latest((f) => f.users?.applied_p95_ms, 20))}, 99 % ${ms(latest((f) => f.users?.applied_p99_ms, 20))} ms`, n: events, tone: applied50 > 1000 ? "warn" : "" });
    const changedN = latest((f) => f.api?.changed_n, 120);
    figures.changed.set(ms(latest((f) => f.api?.changed_p50_ms, 120)), { note: `95 % ${ms(latest((f) => f.api?.changed_p95_ms, 120))}, 99 % ${ms(latest((f) => f.api?.changed_p99_ms, 120))} ms`, n: changedN });
    const asked = latest((f) => f.api?.lookups_s);
    const shed = total((f) => f.api?.shed_s, 60);
    const failed = total((f) => f.api?.errors_s, 60);
    figures.lookups.set(number(asked, asked < 10 ? 1 : 0), { note: shed === null ? "slates drawn for people" : `${number(shed, 0)} turned away, ${number(failed ?? 0, 0)} failed in a minute`, tone: failed > 0 ? "warn" : "" });
    figures.lookup.set(ms(latest((f) => f.api?.lookup_p50_ms)), { note: `95 % ${ms(latest((f) => f.api?.lookup_p95_ms))}, 99 % ${ms(latest((f) => f.api?.lookup_p99_ms))} ms`, n: asked });
    const waiting = latest((f) => f.users?.lag);
    figures.lag.set(number(waiting), { note: `${plural(total((f) => f.users?.duplicates, SHOWN_S) ?? 0, "duplicate")}, ${plural(total((f) => f.users?.dead, SHOWN_S) ?? 0, "dead letter")} in 5 min`, n: "exact", tone: waiting > 5000 ? "warn" : "" });
    spark(sparks.events, column((f) => f.users?.events, SPARK_S));
    spark(sparks.applied, column((f) => f.users?.applied_p50_ms, SPARK_S));
    spark(sparks.changed, column((f) => f.api?.changed_p50_ms, SPARK_S));
    spark(sparks.lookups, column((f) => f.api?.lookups_s, SPARK_S));
    spark(sparks.lookup, column((f) => f.api?.lookup_p50_ms, SPARK_S));
    spark(sparks.lag, column((f) => f.users?.lag, SPARK_S));
    const typed = TYPES.map(([name]) => column((f) => f.users?.[`events_${name}`], SHOWN_S));
    byType.draw(at, typed);
    applied.draw(at, percentiles("applied", "users"), [], { n: column((f) => f.users?.events, SHOWN_S) });
    changed.draw(at, percentiles("changed", "api"), [], { n: column((f) => f.api?.changed_n, SHOWN_S) });
    lookups.draw(at, percentiles("lookup", "api"), [], { n: column((f) => f.api?.lookups_s, SHOWN_S) });
    drawLag(last);
    drawStages();
    drawState(last);
  };

  function drawLag() {
    const users = latest((f) => (f.users && Object.keys(f.users).some((name) => /^lag_\d+$/.test(name)) ? f.users : null), 20);
    noLag.hidden = Boolean(users);
    lag.hidden = !users;
    if (!users) return;
    const names = Object.keys(users).filter((name) => /^lag_\d+$/.test(name)).sort((a, b) => a.slice(4) - b.slice(4));
    lag.set(names.map((name) => ({ label: name.slice(4), value: users[name], text: number(users[name]), n: "exact" })), { max: Math.max(20, ...names.map((name) => users[name])) });
  }

  function drawStages() {
    const rows = STAGES.map(([name, label]) => ({ label, value: latest((f) => f.api?.[`${name}_p50_ms`], 60), mark: latest((f) => f.api?.[`${name}_p99_ms`], 60) })).filter((row) => row.value !== null);
    noStages.hidden = rows.length > 0;
    stages.hidden = rows.length === 0;
    stages.set(rows.map((row) => ({ ...row, mark: row.mark ?? undefined, text: `${ms(row.value)} (${ms(row.mark)}) ms`, n: latest((f) => (f.api?.lookup_p50_ms === undefined ? null : f.api.lookups_s), 60) })));
  }

  function drawState(last) {
    const delay = latest((f) => f.api?.loop_delay_ms);
    const calmWords = `Serving in full. ${number(last.api?.items)} items, model step ${number(last.api?.step)}${delay === null ? "" : `, event loop ${ms(delay)} ms late`}.`;
    const turned = (total((f) => f.api?.shed_s, 10) ?? 0) + (total((f) => f.api?.errors_s, 10) ?? 0);
    const text = turned && !last.api?.degraded ? `Under strain: in the last 10 s ${plural(Math.ceil(turned), "request")} turned away or failed.` : last.api?.degraded ? `Degraded: ${last.api.reason ?? "Redis does not answer"}. Slates come from the arrays in this process: popular and fresh items.` : calmWords;
    if (state.textContent !== text) state.textContent = text;
    state.className = `notice ${last.api?.degraded ? "bad" : turned ? "warn" : "good"}`;
  }

  function freshFrames(after) {
    const found = [];
    column((f) => { if (f.t > after) found.push(f); return null; });
    return found;
  }
}
