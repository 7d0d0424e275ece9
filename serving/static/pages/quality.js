// Quality: how much of the catalogue is seen, how evenly, by topic and by who provides it.
import { bars, card, empty, segments, trouble } from "../cards.js";
import { poll } from "../ask.js";
import { TimeChart } from "../charts.js";
import { h } from "../dom.js";
import { figure } from "../figure.js";
import { number, percent, plural, words } from "../format.js";

export const title = "Quality";
export const lead = "What people get to see, taken together: how much of the catalogue, how evenly, of which topics and from whom.";
export const json = ["/-/quality"];

const EVERY_S = 5;
const MOST = 16;

export function open(root, { signal }) {
  const figures = { coverage: figure("coverage"), gini: figure("gini"), entropy: figure("entropy"), slates: figure("slates_judged") };
  const notice = h("div", {});
  const history = new TimeChart({ title: "Coverage, Gini and entropy", height: 230, max: 1, format: (v) => number(v, 2), series: [{ label: "coverage", color: "s1", def: "coverage" }, { label: "Gini", color: "s2", def: "gini" }, { label: "entropy of topics", color: "s3", def: "entropy" }], empty: "A point every ten seconds in which something is served; the first comes soon." });
  signal.addEventListener("abort", () => history.close());
  const providers = bars("Exposure by provider", "exposure", { head: ["provider", "served (all)"] });
  const categories = bars("Exposure by topic", "exposure", { head: ["topic", "served (all)"] });
  const channels = bars("Slots by channel", "channel_share", { head: ["channel", "share of slots"] });
  const places = [["providers", providers, "No item names a provider."], ["categories", categories, "No item names a category."], ["channels", channels, "No slates yet."]].map(([name, list, none]) => ({ name, list, none: empty("Nothing to show.", none) }));
  const put = (name) => { const place = places.find((one) => one.name === name); return [place.none, place.list]; };
  let order = "share";
  let body = null;
  root.append(
    h("section", { class: "card figures", "aria-label": "Taken together" }, Object.values(figures)),
    notice,
    card("Over time", { width: "two-thirds" }, history.root),
    card("Which channel filled the slots", { width: "third" }, put("channels")),
    card("By provider", { width: "half", lead: "Bar: share of slots served. Tick: share of the catalogue. A bar far from its tick is favoured or starved.", aside: segments("Order", [["share", "most"], ["gap", "farthest off"]], order, (value) => { order = value; if (body) draw(body); }) }, put("providers")),
    card("By topic", { width: "half", lead: "The same; an item of several topics counts in part for each." }, put("categories")),
  );
  poll("/-/quality", EVERY_S, signal, draw, (error) => notice.replaceChildren(trouble(error)));

  function draw(told) {
    body = told;
    notice.replaceChildren();
    const about = { n: `${number(told.slots)} slots of ${plural(told.slates, "slate")}`, window: told.window_s };
    const none = !told.slots;
    figures.coverage.set(percent(none ? null : told.coverage?.value, 1), { note: none ? "no slates yet" : `${number(told.coverage.shown)} of ${number(told.coverage.eligible)} items`, ...about });
    figures.gini.set(number(none ? null : told.gini, 2), { note: "0 even, 1 all on one item", ...about });
    figures.entropy.set(number(none ? null : told.entropy, 2), { note: "1 all topics alike", ...about });
    figures.slates.set(number(told.slates), { note: plural(told.slots ?? 0, "slot"), ...about });
    const rows = told.history ?? [];
    history.draw(rows.map(([t]) => t), [1, 2, 3].map((k) => rows.map((row) => row[k])), [], { window: "15 minutes before each point", n: "slots served in it" });
    const compared = (list, key) => (list ?? []).toSorted((a, b) => (order === "gap" ? Math.abs(b.share - b.catalogue_share) - Math.abs(a.share - a.catalogue_share) : b.share - a.share)).slice(0, MOST).map((one) => ({ label: one[key] || "(none)", value: one.share, mark: one.catalogue_share, text: `${percent(one.share, 1)} (${percent(one.catalogue_share, 1)})`, n: plural(one.slots, "slot") }));
    const filled = { providers: compared(told.providers, "provider"), categories: compared(told.categories, "category"), channels: (told.channels ?? []).map((one) => ({ label: words(one.channel), value: one.share, text: percent(one.share, 1), n: plural(one.slots, "slot") })) };
    for (const { name, list, none: nothing } of places) {
      nothing.hidden = filled[name].length > 0;
      list.hidden = !filled[name].length;
      list.set(filled[name]);
    }
  }
}
