// Slates: the last that were served, and how each came to be.
import { bars, card, empty, facts, refill, segments, trouble } from "../cards.js";
import { ask, poll } from "../ask.js";
import { h, say } from "../dom.js";
import { column, define } from "../figure.js";
import { clock, moment, ms, number, percent, signed, span, words } from "../format.js";

export const title = "Slates";
export const lead = "The last slates that this process served: for whom, how long it took, from which channels, and with which odds each item was drawn.";
export const json = ["/-/slates?limit=24"];

const EVERY_S = 4;
const SCORES = 25;

export function open(root, { argument, signal, sources }) {
  let live = true;
  let chosen = argument;
  let shown = null;
  const count = define(h("span", { class: "soft small" }), "sampled");
  const list = h("ul", { class: "slates" });
  const notice = h("div", {}, empty("Asking …"));
  const detail = h("div", { class: "two-thirds grid nested" });
  root.append(
    card("Last served", { width: "third listed", aside: segments("Follow", [[true, "live"], [false, "hold"]], live, (value) => { live = value; if (live) again(); }) }, count, notice, list),
    detail,
  );
  detail.append(card("One slate", {}, empty("Pick a slate.", "Its items, what it cost, and the candidates it was drawn from.")));

  const again = poll("/-/slates?limit=24", EVERY_S, signal, (told) => {
    if (!live && list.children.length) return;
    draw(told);
  }, (error) => notice.replaceChildren(trouble(error)));

  function draw(told) {
    const rows = told.slates ?? [];
    say(count, rows.length ? `${number(told.kept)} kept: ${percent(told.sampled_share)} of those served in the last ${span(told.window_s)}` : "");
    notice.replaceChildren(...(rows.length ? [] : [empty("No slate was served yet.", "Open the shop front, or ask for one: /v1/recommendations/ann")]));
    const row = (one) => h("li", {}, define(h("a", { href: `#slates/${one.slate_id}`, "data-key": one.slate_id, "aria-current": one.slate_id === chosen ? "true" : undefined }, h("b", {}, one.user_id), h("time", {}, clock(one.t)), h("span", { class: "faint" }, `${one.surface || "default"} · ${one.policy} · ${number(one.items.length)} items`), h("span", { class: "faint num" }, `${ms(sum(one.ms))} ms`)), "slate_ms"));
    refill(list, rows.map(row));
    if (!chosen && rows.length) chosen = rows[0].slate_id;
    const found = rows.find((one) => one.slate_id === chosen);
    if (found && shown !== chosen) drawOne(found);
    else if (chosen && shown !== chosen) ask(`/-/slates/${encodeURIComponent(chosen)}`, { signal }).then(drawOne).catch((error) => !signal.aborted && detail.replaceChildren(card("One slate", {}, error.status === 404 ? empty("This slate is no longer kept.", "Pick another; only the last ones are.") : trouble(error))));
  }

  function drawOne(one) {
    shown = one.slate_id;
    sources(["/-/slates?limit=24", `/-/slates/${one.slate_id}`]);
    const items = h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "#"), h("th", { scope: "col" }, "item"), h("th", { scope: "col" }, "channel and reason"), column("score", { numeric: true }), column("propensity", { numeric: true }))),
      h("tbody", {}, one.items.map((item, k) => h("tr", {}, h("td", { class: "num faint" }, k + 1), h("th", { scope: "row" }, h("a", { href: `#item/${encodeURIComponent(item.item_id)}` }, item.title || item.item_id), h("span", { class: "faint small under" }, item.category ?? "")), h("td", {}, h("span", {}, words(item.channel)), item.explored ? h("span", { class: "chip accent beside" }, "explored") : null, h("span", { class: "faint small under" }, item.reason ?? "")), h("td", { class: "num" }, signed(item.score, 2)), h("td", { class: "num" }, percent(item.propensity, 1))))));
    const spent = Object.entries(one.ms ?? {}).filter(([, value]) => Number.isFinite(value));
    const times = bars("What it cost", "slate_ms", { head: ["stage", "ms"] });
    times.set(spent.map(([name, value]) => ({ label: words(name), value, text: ms(value), n: "one slate" })));
    detail.replaceChildren(
      card(`For ${one.user_id}`, { aside: h("a", { class: "quiet", href: `#user/${encodeURIComponent(one.user_id)}` }, "Open the user") },
        facts([[null, "when", moment(one.t)], [null, "surface", one.surface || "default"], ["policy", "policy", one.policy], ["served_step", "model step", number(one.step)], [null, "state", one.degraded ? "degraded" : "in full"], [null, "slate", one.slate_id]]),
        h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Items of the slate" }, items)),
      card("What it cost", { lead: "Milliseconds in this process, by stage." }, spent.length ? times : empty("Not told.")),
      ...trace(one),
    );
  }

  function trace(one) {
    const { candidates, channels = {}, best = [] } = one.trace ?? {};
    if (!best.length) return [card("Candidates", {}, empty("No candidates were kept of this slate.", "Pick another."))];
    const found = bars("Candidates by channel", "candidates", { head: ["channel", "candidates"] });
    found.set(Object.entries(channels).map(([name, count]) => ({ label: words(name), value: count, text: number(count), n: `${number(candidates)} candidates` })));
    const row = (score, k) => h("tr", { class: score.shown ? "picked" : "" }, h("td", { class: "num faint" }, k + 1), h("th", { scope: "row" }, h("a", { href: `#item/${encodeURIComponent(score.item_id)}` }, score.title || score.item_id)), h("td", {}, words(score.channel)), h("td", {}, score.shown ? h("span", { class: "chip accent" }, "drawn") : ""), h("td", { class: "num" }, signed(score.score, 2)));
    const table = h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "#"), h("th", { scope: "col" }, "candidate"), h("th", { scope: "col" }, "channel"), h("td", {}), column("score", { numeric: true }))), h("tbody", {}, best.map(row)));
    return [
      card("Candidates, by channel", { lead: `Where the ${number(candidates)} candidates of this slate came from.` }, found),
      card("Before the draw", { lead: `The best ${best.length} of ${number(candidates)} candidates by score. Diversity, rules and exploration decide which of them, or others, are drawn.` }, h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Best candidates" }, table)),
    ];
  }
}

function sum(parts) {
  const told = Object.values(parts ?? {}).filter(Number.isFinite);
  return told.length ? told.reduce((all, one) => all + one, 0) : null;
}
