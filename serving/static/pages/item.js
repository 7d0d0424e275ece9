// Item: one item as the recommender knows it: what is believed of it, how popular, what is near, how it gets shown.
import { bars, card, empty, facts, refill, trouble } from "../cards.js";
import { ask, poll } from "../ask.js";
import { Density, axisEnd } from "../density.js";
import { h, say } from "../dom.js";
import { figure } from "../figure.js";
import { finder } from "../finder.js";
import { ago, number, percent, plural, signed, span, words } from "../format.js";
import { hue } from "../theme.js";

export const title = "Item";
export const lead = "What is believed of one item, how popular it is at each half-life, what is like it and through which channels people meet it.";
export const json = ["/-/search?q=a", "/v1/popular"];

const EVERY_S = 2;
const HEIGHT = 150;

export function open(root, { argument: item, signal, sources }) {
  const search = finder("items", { label: "Find an item by title or id", value: item, choose: (id) => { location.hash = `item/${encodeURIComponent(id)}`; } });
  const suggested = h("p", { class: "suggested" });
  const about = h("div", {});
  root.append(card("Find an item", {}, h("div", { class: "controls" }, search, suggested), about));
  ask("/v1/popular?n=5", { signal }).then(({ items }) => {
    if (items.length) suggested.replaceChildren("popular now ", ...items.map((one) => h("a", { href: `#item/${encodeURIComponent(one.item_id)}` }, one.title || one.item_id)));
  }).catch(() => {}); // the box still takes any id
  if (!item) {
    about.replaceChildren(empty("Pick an item.", "Type part of a title or an id, or take one of the popular."));
    return null;
  }
  const id = encodeURIComponent(item);
  sources([`/v1/items/${id}`, `/-/items/${id}`]);
  const figures = { shown: figure("shown"), mean: figure("posterior_mean"), dwell: figure("dwell"), rating: figure("rating") };
  const density = new Density({ height: HEIGHT });
  const axis = h("p", { class: "axis small faint", "aria-hidden": "true" }, h("span", {}, "0 %"), h("span", {}));
  const posterior = h("div", {});
  const popularity = bars("Decayed counts", "decayed_count", { head: ["half-life", "count"] });
  const channels = bars("Channels", "item_channels", { head: ["channel", "share of its slots"] });
  const lists = { next: bars("Chosen next", "next_weight", { head: ["item", "weight"], named: true }), together: bars("Chosen by the same people", "together_weight", { head: ["item", "weight"], named: true }), vector: bars("Nearest by vector", "similarity", { head: ["item", "cosine"], named: true }) };
  const none = { channels: empty("Not shown of late.", "Shares appear when slates of this process show it."), next: empty("Nothing yet.", "What people choose after it appears here."), together: empty("Nothing yet.", "What the same people choose appears here."), vector: empty("No vector yet.", "It is learnt from the first outcomes on.") };
  const sampled = h("p", { class: "soft small" });
  root.append(
    h("section", { class: "card figures", "aria-label": "In short" }, Object.values(figures)),
    card("Share of clicks, as believed", { width: "half", lead: "The posterior of how often it is chosen where it is seen, allowing for its place in the slate; dashed as it was when you came." }, h("div", { class: "big-density" }, density.canvas, axis), posterior),
    card("Popularity at each half-life", { width: "half", lead: "How many people chose it, each choice fading by half in that time." }, popularity),
    card("How people meet it", { width: "half", lead: "Channels whose candidates filled its slots." }, none.channels, channels, sampled),
    card("Nearest by vector", { width: "half", lead: "What the encoder takes for alike." }, none.vector, lists.vector),
    card("Chosen next", { width: "half", lead: "What follows it in people's sequences." }, none.next, lists.next),
    card("Chosen by the same people", { width: "half", lead: "Within a longer stretch of their sequences." }, none.together, lists.together),
  );
  let top = 0;
  const watch = new ResizeObserver(() => density.paint());
  watch.observe(density.canvas);
  signal.addEventListener("abort", () => { density.close(); watch.disconnect(); });

  poll(`/v1/items/${id}`, EVERY_S, signal, draw, (error) => {
    about.replaceChildren(error.status === 404 ? empty(`${item} is not known.`, "An item becomes known by its first event, or by PUT /v1/items/ID.") : trouble(error));
  });
  poll(`/-/items/${id}`, EVERY_S, signal, drawChannels, () => {});

  function fill(name, list, rows, max) {
    none[name].hidden = rows.length > 0;
    list.hidden = !rows.length;
    list.set(rows, { max });
  }

  function draw(told) {
    const { catalogue, posterior: believed } = told;
    const { click, log_dwell: dwell, rating } = believed;
    const tags = [...(catalogue?.categories ?? []).map((name) => h("span", { class: "chip hued", style: { "--hue": hue(name) } }, name)), ...(catalogue?.tags ?? []).map((name) => h("span", { class: "chip" }, name)), told.still_exploring ? h("span", { class: "chip accent" }, "still tried out") : null, told.eligible ? null : h("span", { class: "chip warn" }, "not shown: hidden or not eligible")];
    refill(about, h("div", { class: "item-title" }, h("h3", {}, catalogue?.title || item), h("span", { class: "tags" }, tags)),
      catalogue?.text ? h("p", { class: "soft" }, catalogue.text) : null,
      facts([[null, "id", told.item_id], [null, "provider", catalogue?.provider || "–"], [null, "first outcome", told.first_time ? ago(told.first_time) : "none yet"], [null, "last outcome", told.last_time ? ago(told.last_time) : "none yet"], ["outcomes", "outcomes", number(told.outcomes), { n: "counted" }]]));
    figures.shown.set(number(told.shown), { note: told.still_exploring ? "still tried out" : "explored", n: "counted" });
    const n = `${number(believed.exposures, 1)} exposures`;
    figures.mean.set(percent(click.mean, 1), { note: `95 %: ${percent(click.low, 1)} to ${percent(click.high, 1)}`, n });
    figures.dwell.set(dwell.observations > 0 ? span(Math.round(Math.exp(dwell.mean))) .split(" ")[0] : "–", { note: dwell.observations > 0 ? `95 %: ${number(Math.exp(dwell.low), 0)} to ${number(Math.exp(dwell.high), 0)} s` : "nobody stayed yet", n: plural(Math.round(dwell.observations), "dwell") });
    figures.dwell.querySelector(".value span").textContent = span(Math.round(Math.exp(dwell.mean))).split(" ")[1];
    figures.rating.set(rating.observations > 0 ? number(rating.mean, 2) : "–", { note: rating.observations > 0 ? `95 %: ${number(rating.low, 2)} to ${number(rating.high, 2)}` : "nobody rated yet", n: plural(Math.round(rating.observations), "rating") });
    const wanted = axisEnd(1.15 * click.high);
    if (wanted > top || wanted < 0.5 * top) top = wanted;
    say(axis.lastChild, percent(top));
    density.set(click, top, `Posterior of the share of clicks: ${percent(click.mean, 1)}, 95 % between ${percent(click.low, 1)} and ${percent(click.high, 1)}`);
    posterior.replaceChildren(facts([["exposures", "exposures", number(believed.exposures, 1), { n }], ["successes", "chosen", number(believed.successes, 1), { n }], ["posterior", "alpha, beta", `${number(click.alpha, 1)}, ${number(click.beta, 1)}`, { n }]]));
    popularity.set(Object.entries(told.decayed_counts).map(([name, value]) => ({ label: name === "none" ? "all time" : name, value, text: number(value, value < 10 ? 2 : 0), n: plural(told.outcomes, "outcome") })));
    const near = (list) => list.filter((one) => one.item_id || one.title).slice(0, 10).map((one) => ({ label: one.title || one.item_id, value: one.weight, text: number(one.weight, 2), href: `#item/${encodeURIComponent(one.item_id)}`, n: plural(told.outcomes, "outcome") }));
    fill("next", lists.next, near(told.next));
    fill("together", lists.together, near(told.together));
  }

  function drawChannels(told) {
    fill("channels", channels, told.channels.map((one) => ({ label: words(one.channel), value: one.share, text: percent(one.share), n: plural(one.slots, "slot") })), 1);
    say(sampled, told.slots ? `${plural(told.slots, "slot")} in the last ${span(told.window_s)}.` : "");
    fill("vector", lists.vector, told.neighbours_by_vector.slice(0, 10).map((one) => ({ label: one.title || one.item_id, value: Math.max(0, one.similarity), text: signed(one.similarity, 2), href: `#item/${encodeURIComponent(one.item_id)}`, n: "two vectors" })), 1);
  }
}
