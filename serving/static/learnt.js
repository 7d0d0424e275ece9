// What the last act changed: in the slate (came, went, moved) and in the profile (counts, sequence, weights).
import { h } from "./dom.js";
import { column, define, register } from "./figure.js";
import { number, plural, signed, words } from "./format.js";
import { hue } from "./theme.js";

const ACT = "this one act";
const MOST = 4; // titles of each list
const SEQUENCE = 6;
const DONE = { click: "You opened", dwell: "You read", rating: "You gave stars to", action: "You hid" };

const TRY = [
  "Open a tile that you like: others like it come, within milliseconds.",
  "Leave it open for half a minute, or give it stars: both say more than a click.",
  "Hide what you do not want (✕ on a tile).",
  "Let a topic surge below, and see when the crowd's slates follow.",
  "Start over: you are a stranger again.",
];

register({
  weight: { name: "Weight", what: "How much this item says of your taste: the sum of what you did with it (a click 1, a like .8, thirty seconds .5, stars by their place on the scale, hiding it -1).", unit: "weight", window: "until newer items push it out (the newest 50 are kept)", n: "your acts on this item" },
  decay: { name: "What is left of it", what: "What time has left of this weight in the taste of the last hour (it halves every hour).", unit: "share", window: "half-life of 1 h", n: "1" },
  slate_change: { name: "What changed in the slate", what: "Tiles that came, went, moved or stayed between the slate before this act and the one after.", unit: "tiles", window: ACT, n: "12 places" },
});

// Why an item is there, in words: its channel and its reason.
export function why(item) {
  return item.reason || words(item.channel);
}

function titled(name, items) {
  if (!items.length) return null;
  const more = items.length > MOST ? h("li", { class: "wait" }, `and ${items.length - MOST} more`) : null;
  return [h("h3", {}, `${name} (${items.length})`), h("ul", { class: "changes" }, items.slice(0, MOST), more)];
}

function line(item, note) {
  const topic = item.categories?.[0] ?? item.item_id;
  return h("li", {}, h("span", { class: "dot hued", style: { "--hue": hue(topic) } }), h("span", {}, item.title || item.item_id, note && h("small", {}, note)));
}

export class Learnt {
  constructor(place) {
    this.place = place;
    this.seen = new Map(); // item id -> item, of the slates so far
    this.profile = null;
  }

  start(slate, profile) {
    this.profile = profile;
    for (const one of slate.items) this.seen.set(one.item_id, one);
    const known = profile.sequence.length;
    if (known) this.place.replaceChildren(h("p", { class: "lead" }, `You were here before: it remembers ${plural(known, "item")}.`), ...this.sequence(profile, null));
    else this.place.replaceChildren(h("p", { class: "lead" }, "Nothing yet: it does not know you. What came, went and moved, and what your profile then holds, is told here. Try:"), h("ol", { class: "try" }, TRY.map((text) => h("li", {}, text))));
  }

  tell({ item, rest, slate, before, profile, visitor }) {
    const now = new Map(slate.items.map((one) => [one.item_id, one]));
    const came = slate.items.filter((one) => !before.includes(one.item_id));
    const went = before.filter((id) => !now.has(id)).map((id) => this.seen.get(id) ?? { item_id: id });
    const moved = slate.items.filter((one) => one.moved);
    for (const one of slate.items) this.seen.set(one.item_id, one);
    if (this.seen.size > 200) this.seen = new Map([...this.seen].slice(-100));
    const did = `${DONE[rest.type]} “${item.title || item.item_id}”`;
    const how = rest.type === "dwell" ? ` for ${number(rest.seconds, 0)} s` : rest.type === "rating" ? `: ${rest.value} of 5` : "";
    const stayed = slate.items.length - came.length - moved.length;
    this.place.replaceChildren(
      h("p", { class: "did" }, did, how, "."),
      define(h("p", { class: "tally" }, h("b", {}, `${came.length} came`), h("b", {}, `${went.length} went`), h("b", {}, `${moved.length} moved`), h("b", {}, `${stayed} stayed`)), "slate_change"),
      ...this.sequence(profile, item),
      ...(titled("Came", came.map((one) => line(one, why(one)))) ?? []),
      ...(titled("Went", went.map((one) => line(one, one.item_id === item.item_id ? "you know it now" : ""))) ?? []),
      h("p", { class: "more" }, this.counts(profile), h("a", { href: `/dashboard#user/${encodeURIComponent(visitor)}` }, "All it knows of you")),
    );
    this.profile = profile;
  }

  counts(profile) {
    const changed = Object.entries(profile.counters).filter(([name, count]) => count !== (this.profile?.counters[name] ?? 0) && name !== "impression" && name !== "view");
    const told = changed.map(([name, count]) => `${name} ${this.profile?.counters[name] ?? 0} → ${count}`).join(", ");
    return told ? `Counters: ${told}. ` : "";
  }

  sequence(profile, item) {
    const was = new Map((this.profile?.sequence ?? []).map((entry) => [entry.item_id, entry.weight]));
    const rows = profile.sequence.slice(0, SEQUENCE).map((entry) => {
      const before = was.get(entry.item_id);
      const fresh = entry.item_id === item?.item_id;
      const step = fresh ? entry.weight - (before ?? 0) : 0;
      return h("tr", { class: fresh ? "fresh" : undefined },
        h("td", {}, entry.title || entry.item_id),
        h("td", { class: "num" }, number(entry.weight, 1), step ? h("small", {}, ` ${signed(step, 1)}`) : null),
        h("td", { class: "num" }, number(entry.decay["1h"], 2)));
    });
    if (!rows.length) return [h("h3", {}, "In your profile"), h("p", { class: "lead" }, "Nothing that counts for you yet; what you hid is kept as an aversion.")];
    const head = h("tr", {}, h("th", { scope: "col" }, "item"), column("weight", { numeric: true, label: "weight" }), column("decay", { numeric: true, label: "left of it" }));
    return [h("h3", {}, `In your profile (newest of ${profile.sequence.length})`), h("div", { class: "table" }, h("table", { id: "sequence" }, h("thead", {}, head), h("tbody", {}, rows)))];
  }
}
