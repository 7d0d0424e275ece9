// Learning: is it getting better? Prequential figures (each outcome judged before it is learnt), rates, drift.
import { card, empty, segments } from "../cards.js";
import { TimeChart } from "../charts.js";
import { h } from "../dom.js";
import { figure } from "../figure.js";
import { ago, clock, number, percent, plural, signed, words } from "../format.js";
import { column, latest, times, total } from "../stream.js";

export const title = "Learning";
export const lead = "Every outcome is first predicted, then learnt. A red mark is a drift alarm: losses rose for good. At one of the rankers' the ranker learns faster for a while.";
export const json = ["/-/live", "/-/models"];

const COLORS = ["s1", "s2", "s3", "s4", "s5", "s6", "s7"];
const FASTER = ": the ranker learns faster now";
const WATCHED = { linear: `the linear ranker rose${FASTER}`, network: `the ranker's network rose${FASTER}`, encoder: "the encoder rose (watched; it learns on as before)", values: "predicted ratings rose (watched; they are learnt on as before)" };
const WINDOWS = [[30, "30 s"], [60, "1 min"], [300, "5 min"]];
const ALARMS = 60;
const EVERY_S = 2; // ten charts of 15 minutes need not be drawn each second

// Sums over the last `window` seconds, at each second.
function sums(at, values, window) {
  let first = 0;
  let sum = 0;
  return at.map((t, k) => {
    sum += values[k] ?? 0;
    while (at[first] <= t - window) sum -= values[first++] ?? 0;
    return sum;
  });
}

// Such sums divided by each other; null below `least` of the lower one.
function ratio(at, above, below, window, least = 1) {
  const bottom = sums(at, below, window);
  return sums(at, above, window).map((top, k) => (bottom[k] >= least ? top / bottom[k] : null));
}

const once = (values) => values.map((value) => (value === null ? null : 1));

function mean(at, values, window) {
  return ratio(at, values, once(values), window);
}

function weighted(at, values, weights, window) {
  return ratio(at, values.map((value, k) => (value === null ? null : value * weights[k])), weights, window);
}

// How many steps such a mean is of.
function steps(at, values, window) {
  return sums(at, once(values), window).map((count) => plural(count, "step"));
}

const newest = (values) => values.findLast((value) => value !== null) ?? null;

export function open(root, { signal }) {
  let window = 60;
  const figures = { hit: figure("hit_rate"), ndcg: figure("ndcg"), loss: figure("click_loss"), calibration: figure("calibration"), regret: figure("regret"), lead: figure("lead") };
  const sync = "learning";
  const made = [];
  const chart = (options) => {
    const one = new TimeChart({ sync, ...options });
    made.push(one);
    return one;
  };
  const quality = chart({ title: "Prequential quality of served slates", max: null, height: 220, format: (v) => number(v, 3), series: [{ label: "hit rate", color: "s1", def: "hit_rate", width: 2.5 }, { label: "NDCG", color: "s3", def: "ndcg" }], empty: "No slate with a known outcome yet. It needs people who ask for slates and click: freshet simulate." });
  const world = chart({ title: "Expected clicks a slate", height: 220, format: (v) => number(v, 2), series: [{ label: "best possible", color: "oracle", def: "oracle", dash: [3, 5] }, { label: "Freshet", color: "ours", def: "ours", width: 2.5 }, { label: "popularity", color: "popular", def: "popular" }, { label: "regret", color: "s5", def: "regret", width: 1.25 }], empty: "Only a simulated world knows the best slate. Start one: freshet simulate." });
  const losses = chart({ title: "Losses before learning", format: (v) => number(v, 2), min: null, series: [{ label: "encoder", color: "s4", def: "encoder_loss" }, { label: "ranker", color: "s2", def: "ranker_loss" }], empty: "The learner has taken no step yet." });
  const logLoss = chart({ title: "Log loss of clicks", format: (v) => number(v, 3), series: [{ label: "log loss", color: "s1", def: "click_loss" }], empty: "Nothing shown has an outcome yet." });
  const calibration = chart({ title: "Calibration: predicted and observed share of clicks", format: (v) => percent(v, 1), series: [{ label: "predicted", color: "s1", def: "shown_predicted" }, { label: "observed", color: "s2", def: "shown_chosen" }], empty: "Nothing shown has an outcome yet." });
  const gradient = chart({ title: "Gradient norm", format: (v) => number(v, 2), series: [{ label: "ranker", color: "s2", def: "gradient_norm" }, { label: "encoder", color: "s4", def: "gradient_norm_encoder" }], empty: "The learner has taken no step yet." });
  const drift = chart({ title: "Drift of item vectors", format: (v) => number(v, 4), series: [{ label: "cosine distance a step", color: "s5", def: "vector_drift" }], empty: "The learner has taken no step yet." });
  const policyPlace = h("div", {});
  const ratePlace = h("div", {});
  const alarmList = h("ul", { class: "news", tabindex: "0", "aria-label": "Drift alarms" });
  const calm = empty("No drift alarm in the last 15 minutes.", "An alarm says which losses rose; it is marked in every chart of this page.");
  root.append(
    h("section", { class: "card figures six", "aria-label": "How well it does" }, Object.values(figures)),
    card("Do people take what is served?", { width: "half", lead: "Served slates, judged by what was chosen of them.", aside: segments("Window of the means", WINDOWS, window, (value) => { window = value; draw(); }) }, quality.root),
    card("Against the best there is", { width: "half", lead: "The simulated world knows what to expect of any slate; regret is best possible less ours." }, world.root),
    card("By policy", { width: "half", lead: "Hit rate of slates, by how they were drawn." }, policyPlace),
    card("Log loss of clicks", { width: "half", lead: "Surprise about each shown item; lower is better." }, logLoss.root),
    card("Losses", { width: "third", lead: "Encoder and ranker, each before learning." }, losses.root),
    card("Calibration", { width: "third", lead: "What was predicted of shown items, and what came." }, calibration.root),
    card("Drift alarms", { width: "third", lead: "When, and what changed." }, calm, alarmList),
    card("Learning rates chosen", { width: "third", lead: "Adagrad sets them from the gradients so far; an alarm raises the ranker's." }, ratePlace),
    card("Gradient norm", { width: "third", lead: "How strongly a step pulls at the weights." }, gradient.root),
    card("Drift of item vectors", { width: "third", lead: "How far the vectors of touched items move in a step." }, drift.root),
  );
  signal.addEventListener("abort", () => made.forEach((one) => one.close()));

  // Charts whose lines are known only when they are told: remade where a name comes.
  function named(place, options) {
    let names = "";
    let one = null;
    place.replaceChildren(empty(options.nothing[0], options.nothing[1]));
    return (found, at, columns, marks, about) => {
      if (found.join() !== names && found.length) {
        names = found.join();
        if (one) {
          one.close();
          made.splice(made.indexOf(one), 1);
        }
        one = chart({ ...options, series: found.map((name, k) => ({ label: words(name), color: COLORS[k % COLORS.length], def: options.def })) });
        place.replaceChildren(one.root);
      }
      if (found.length) one.draw(at, columns, marks, about);
    };
  }
  const policies = named(policyPlace, { title: "Hit rate by policy", def: "hit_rate", format: (v) => number(v, 3), nothing: ["Not told yet.", "Policies appear with the first outcomes of their slates."] });
  const rates = named(ratePlace, { title: "Learning rates chosen", def: "rate", log: true, format: (v) => number(v, 4), nothing: ["Not told yet.", "Rates appear with the learner's next step."] });

  const learner = (name) => column((f) => f.learner?.[name]);
  const namesOf = (prefix) => {
    const found = new Set();
    column((f) => { for (const name in f.learner ?? {}) if (name.startsWith(prefix)) found.add(name.slice(prefix.length)); return null; });
    return [...found].sort();
  };

  function alarms() {
    const found = [];
    column((f) => {
      const what = Object.entries(WATCHED).filter(([name]) => f.learner?.[`alarm_${name}`] > 0).map(([, called]) => called);
      if (what.length || f.learner?.alarms > 0) found.push({ t: f.t, text: what.length ? `losses of ${what.join("; those of ")}` : "losses rose" });
      return null;
    });
    return found;
  }

  function drawAlarms(found) {
    calm.hidden = found.length > 0;
    alarmList.hidden = !found.length;
    const texts = found.slice(-ALARMS).reverse();
    if (alarmList.children.length === texts.length && alarmList.firstChild?.dataset?.t === String(texts[0]?.t)) return;
    alarmList.replaceChildren(...texts.map(({ t, text }) => h("li", { "data-t": t }, h("time", { datetime: new Date(1000 * t).toISOString(), title: ago(t) }, clock(t)), h("span", {}, text))));
  }

  function draw() {
    const at = times();
    const marks = alarms();
    const slates = learner("slates");
    const hit = ratio(at, learner("hits"), slates, window, 5);
    const ndcg = ratio(at, learner("ndcg_sum"), slates, window, 5);
    const n = total((f) => f.learner?.slates, window);
    figures.hit.set(number(newest(hit), 3), { note: n === null ? "" : `of ${number(n)} slates`, n, window });
    figures.ndcg.set(number(newest(ndcg), 3), { note: "1 = every click on top", n, window });
    const judged = learner("shown");
    const surprise = weighted(at, learner("click_loss"), judged, window);
    const predicted = ratio(at, learner("shown_predicted"), judged, window, 10);
    const observed = ratio(at, learner("shown_chosen"), judged, window, 10);
    const n4 = plural(sums(at, judged, window).at(-1), "shown item");
    figures.loss.set(number(newest(surprise), 3), { note: "lower is better", n: n4, window });
    const over = newest(predicted) !== null && newest(observed) ? newest(predicted) / newest(observed) : null;
    figures.calibration.set(number(over, 2), { note: over === null ? "" : "1 = as many as predicted", n: n4, window });
    const [ours, oracle, popular] = ["ours", "oracle", "popular"].map((name) => mean(at, column((f) => f.world?.[name]), 10));
    const regret = oracle.map((value, k) => (value === null || ours[k] === null ? null : value - ours[k]));
    const worldly = latest((f) => f.world, 20);
    const people = worldly?.users;
    figures.regret.set(number(newest(regret), 2), { note: "best possible less ours", n: worldly?.slates ? `${number(worldly.slates)} slates since the start` : undefined, window: 10 });
    figures.lead.set(signed(worldly?.lead, 2), { note: worldly ? `95 %: ${signed(worldly.lead_low, 2)} to ${signed(worldly.lead_high, 2)}` : "no simulated world", n: people ? `${number(people)} people` : undefined, window: worldly?.lead_s, tone: worldly?.lead_low > 0 ? "good" : worldly?.lead_high < 0 ? "bad" : "" });
    quality.draw(at, [hit, ndcg], marks, { window, n: sums(at, slates, window) });
    world.draw(at, [oracle, ours, popular, regret], marks);
    const [outcomes, lists] = [learner("events"), learner("lists")];
    losses.draw(at, [weighted(at, learner("encoder_loss"), outcomes, 10), weighted(at, learner("ranker_loss"), lists, 10)], marks, { window: 10, n: (k) => sums(at, [outcomes, lists][k], 10) });
    logLoss.draw(at, [surprise], marks, { window, n: sums(at, judged, window) });
    calibration.draw(at, [predicted, observed], marks, { window, n: sums(at, judged, window) });
    const norms = [learner("gradient_norm"), learner("gradient_norm_encoder")];
    gradient.draw(at, norms.map((values) => mean(at, values, 10)), marks, { window: 10, n: (k) => steps(at, norms[k], 10) });
    const touched = learner("vector_drift_n");
    drift.draw(at, [weighted(at, learner("vector_drift"), touched, 10)], marks, { window: 10, n: sums(at, touched, 10) });
    const drawn = namesOf("slates_");
    policies(drawn, at, drawn.map((name) => ratio(at, learner(`hits_${name}`), learner(`slates_${name}`), window, 5)), marks, { window, n: (k) => sums(at, learner(`slates_${drawn[k]}`), window) });
    const parts = namesOf("rate_");
    rates(parts, at, parts.map((name) => learner(`rate_${name}`)), marks);
    drawAlarms(marks);
  }
  let drawnAt = 0;
  return (last) => {
    if (last.t - drawnAt < EVERY_S) return;
    drawnAt = last.t;
    draw();
  };
}
