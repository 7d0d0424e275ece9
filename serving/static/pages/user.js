// User: one person as the recommender knows them now, on the map of items, and what their last act changed.
import { card, empty, facts, refill, trouble } from "../cards.js";
import { ask, poll } from "../ask.js";
import { Atlas } from "../atlas.js";
import { h, say } from "../dom.js";
import { column, define, inline } from "../figure.js";
import { finder } from "../finder.js";
import { ago, number, percent, signed, span, words } from "../format.js";

export const title = "User";
export const lead = "Where one person stands among the items, what is remembered of them and fades, and what the next slate would be.";
export const json = ["/-/search?q=a", "/-/map"];

const USER_S = 0.4;
const SLATE_S = 3;
const MAP_S = 15;
const MAP_ITEMS = 600;
const SHOWN = 10;
const N = 10;
const NEAR = 5;
const HALF_LIVES = [["1h", 3600], ["30d", 30 * 86400]];

export function open(root, { argument: user, signal, sources }) {
  const search = finder("users", { label: "Find a user by id", value: user, choose: (id) => { location.hash = `user/${encodeURIComponent(id)}`; } });
  const suggested = h("p", { class: "suggested" });
  const about = h("div", {});
  root.append(card("Find a user", {}, h("div", { class: "controls" }, search, suggested), about));
  suggest(suggested, signal);
  if (!user) {
    about.replaceChildren(empty("Pick somebody.", "Type an id, or take one of those who were served last. Your own visitor of the shop front is here once you have been there."));
    return null;
  }
  const id = encodeURIComponent(user);
  const slateUrl = `/v1/recommendations/${id}?n=${N}&trace=true&track=false&policy=greedy`;
  sources([`/v1/users/${id}`, `/-/map/users/${id}`, `/-/map?limit=${MAP_ITEMS}`, slateUrl]);

  const atlas = new Atlas({ pick: (item) => { location.hash = `item/${encodeURIComponent(item.item_id)}`; } });
  const mapNote = h("p", { class: "soft small" });
  const near = h("p", { class: "soft small" });
  const mapEmpty = h("div", {}, empty("Asking …"));
  const sequence = h("div", {}, empty("Asking …"));
  const next = h("div", {}, empty("Asking …"));
  const changed = h("div", {}, empty("Waiting for the next act.", "When this user clicks, rates or stays, the slate before and after stand here side by side."));
  root.append(
    card("On the map", { width: "two-thirds", lead: "Dots are items, coloured by topic, larger where shown more. The filled point is the user over the last hour, the ring over 30 days; lines lead to what is remembered." }, mapEmpty, atlas.root, near, mapNote),
    card("What is remembered", { width: "third", lead: "The newest of the sequence; its weight fades by half in an hour (bar) and in 30 days (pale bar)." }, sequence),
    card("The next slate", { width: "half", lead: "Drawn without chance and without being counted, so that only what was learnt shows." }, next),
    card("What the last act changed", { width: "half" }, changed),
  );
  signal.addEventListener("abort", () => atlas.close());
  atlas.root.hidden = true;

  let before = null; // the slate as it was before the newest act
  let pending = null; // a slate of which it is not sure yet that no act came before it
  let began = 0; // when the profile was last asked for
  let last = null; // key of the newest entry
  let entries = [];
  let point = null;

  poll(() => { began = performance.now(); return `/v1/users/${id}`; }, USER_S, signal, async (told) => {
    drawAbout(told);
    entries = told.sequence.toReversed().sort((a, b) => b.time - a.time);
    const newest = entries[0] ? `${entries[0].hash}@${entries[0].time}` : "";
    const acted = last !== null && newest !== last;
    last = newest;
    if (acted || !drawn.size) drawSequence();
    if (acted) await afterAct(entries[0]);
    else if (pending && began > pending.at) before = pending.slate;
  }, (error) => about.replaceChildren(trouble(error)));

  const askSlate = poll(slateUrl, SLATE_S, signal, (slate) => { pending = { slate, at: performance.now() }; drawNext(slate); }, (error) => next.replaceChildren(trouble(error)));

  poll(`/-/map?limit=${MAP_ITEMS}`, MAP_S, signal, ({ basis, items }) => {
    const some = basis && items.length > 0;
    atlas.root.hidden = !some;
    mapEmpty.replaceChildren(...(some ? [] : [empty("No map yet.", "It is drawn once the learner has vectors for some items: a few steps after the first clicks.")]));
    if (!some) return;
    atlas.items(items);
    say(mapNote, `The ${number(items.length)} items shown most. The plane was fixed at step ${number(basis.step)}, from ${number(basis.rows)} items, and holds ${percent(basis.explained)} of their vectors' variance; its axes have no unit.`);
    locate();
  }, (error) => mapEmpty.replaceChildren(trouble(error)));

  poll(`/-/map/users/${id}`, USER_S, signal, (told) => {
    point = told;
    atlas.user(told);
    locate();
  }, () => {});

  function locate() {
    if (!point?.hour || !atlas.points.length) return say(near, point && !point.hour ? "The user has no point yet: nothing of what they did has a learnt vector." : "");
    const names = atlas.nearest(point.hour, NEAR).map((item) => item.title || item.item_id);
    const text = `Nearest to the last hour: ${names.join(" · ")}`;
    say(near, text);
    atlas.describe(`Map of ${atlas.points.length} items and the user. ${text}`);
  }

  let aboutText = "";
  function drawAbout(told) {
    const text = JSON.stringify([told.counters, told.seen, told.problem, ago(told.last_time)]);
    if (text === aboutText) return;
    aboutText = text;
    const counted = Object.entries(told.counters).filter(([name, count]) => count > 0 && name !== "duplicate");
    if (!told.known) return about.replaceChildren(empty(`Nothing is known of ${user}.`, "They would be served what is popular and new. Click as this user in the shop front, or POST /v1/events."));
    const list = facts([
      ...counted.map(([name, count]) => ["counter", plurals(name), number(count), { n: "counted" }]),
      [null, "first seen", ago(told.first_time)], [null, "last seen", ago(told.last_time)], ["seen", "items seen", number(told.seen), { n: "hashes kept" }], ["partition", "partition", number(told.partition), { n: "exact" }],
    ]);
    refill(about, list, told.problem ? h("p", { class: "notice bad" }, told.problem) : null);
  }

  const drawn = new Map();
  function drawSequence() {
    if (!entries.length) return sequence.replaceChildren(empty("Nothing yet.", "Clicks, dwells, ratings and actions enter the sequence; views and slates do not."));
    const now = Date.now() / 1000;
    const rows = entries.slice(0, SHOWN).map((entry) => {
      const key = `${entry.hash}@${entry.time}@${entry.kind}`;
      const row = drawn.get(key) ?? sequenceRow(entry);
      drawn.set(key, row);
      for (const [k, [, half]] of HALF_LIVES.entries()) row.fills[k].style.width = `${100 * 0.5 ** (Math.max(0, now - entry.time) / half)}%`;
      say(row.age, span(Math.max(0, Math.round(now - entry.time))));
      say(row.decay, percent(0.5 ** (Math.max(0, now - entry.time) / 3600), 0));
      return row.root;
    });
    for (const key of drawn.keys()) if (!rows.includes(drawn.get(key).root)) drawn.delete(key);
    const list = sequence.firstElementChild?.matches("ul") ? sequence.firstElementChild : h("ul", { class: "sequence" });
    if (rows.some((row, k) => list.children[k] !== row) || rows.length !== list.children.length) list.replaceChildren(...rows);
    if (sequence.firstElementChild !== list) sequence.replaceChildren(list);
  }

  function sequenceRow(entry) {
    const fills = HALF_LIVES.map(() => h("i"));
    const age = h("span", { class: "faint small" });
    const decay = define(h("b", { class: "tabular" }), "decay", { n: "one event" });
    const name = entry.item_id ? h("a", { href: `#item/${encodeURIComponent(entry.item_id)}` }, entry.title || entry.item_id) : h("span", { class: "mono" }, entry.hash);
    return { root: h("li", {}, h("span", { class: "line" }, name, decay), h("div", { class: "meter double", "aria-hidden": "true" }, fills[1], fills[0]), h("span", { class: "line small" }, define(h("span", { class: "soft" }, `${entry.kind}, weight ${signed(entry.weight, 2)}`), "entry_weight"), age)), fills, age, decay };
  }

  function slateRows(slate, old) {
    const parts = new Map((slate.trace?.scores ?? []).map((score) => [score.id, score]));
    const place = new Map((old?.items ?? []).map((item, k) => [item.item_id, k]));
    return slate.items.map((item, k) => {
      const was = place.get(item.item_id);
      const move = !old ? null : was === undefined ? h("span", { class: "chip accent" }, "new") : was === k ? h("span", { class: "faint" }, "=") : h("span", { class: was > k ? "up" : "down" }, `${was > k ? "▲" : "▼"} ${Math.abs(was - k)}`, h("span", { class: "visually-hidden" }, was > k ? " places up" : " places down"));
      return h("tr", { class: old && was === undefined ? "picked" : "" }, h("td", { class: "num faint" }, k + 1), h("th", { scope: "row" }, h("a", { href: `#item/${encodeURIComponent(item.item_id)}`, "data-key": `${item.item_id}` }, item.title || item.item_id), h("span", { class: "faint small under" }, item.reason || item.categories?.[0] || "")),
        old ? h("td", { class: "num" }, move) : [h("td", { class: "small" }, words(item.channel)), h("td", { class: "num" }, signed(item.score, 2)), h("td", { class: "num" }, percent(parts.get(item.item_id)?.probability, 1))]);
    });
  }

  function drawNext(slate) {
    if (!slate.items.length) return next.replaceChildren(empty("Nothing to show.", slate.reason || "No item is known yet: PUT /v1/items/ID, or let somebody click."));
    const head = h("tr", {}, h("th", { scope: "col", class: "num" }, "#"), h("th", { scope: "col" }, "item and reason"), h("th", { scope: "col" }, "channel"), column("score", { numeric: true }), column("probability", { numeric: true }));
    refill(next, h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "The next slate" }, h("table", {}, h("thead", {}, head), h("tbody", {}, slateRows(slate, null)))), h("p", { class: "small soft" }, `Model step ${number(slate.model_step)}${slate.degraded ? ", degraded" : ""}; ${number(slate.trace?.scores?.length)} candidates scored; `, inline("slate_ms", `${number(sum(slate.trace?.ms), 1)} ms`), "."));
  }

  async function afterAct(entry) {
    const old = before;
    pending = null;
    const fresh = await ask(slateUrl, { signal });
    askSlate();
    if (!old || !entry) return;
    const ids = new Set(fresh.items.map((item) => item.item_id));
    const gone = old.items.filter((item) => !ids.has(item.item_id));
    const come = fresh.items.filter((item) => !old.items.some((one) => one.item_id === item.item_id)).length;
    const head = h("tr", {}, h("th", { scope: "col", class: "num" }, "#"), h("th", { scope: "col" }, "slate after it"), column("moved", { numeric: true }));
    changed.replaceChildren(
      h("p", { role: "status" }, h("b", {}, `${entry.kind}: ${entry.title || entry.item_id || entry.hash}`), h("span", { class: "soft" }, ` · ${come} of ${fresh.items.length} are new`)),
      h("div", { class: "table" }, h("table", {}, h("thead", {}, head), h("tbody", {}, slateRows(fresh, old)))),
      gone.length ? h("p", { class: "small soft gone" }, "Gone: ", h("s", {}, gone.map((item) => item.title || item.item_id).join(" · "))) : "",
    );
  }
  return () => entries.length && drawSequence();
}

async function suggest(place, signal) {
  const visitor = localStorage.getItem("freshet.visitor");
  let served = [];
  try {
    served = (await ask("/-/slates?limit=16", { signal })).slates.map((slate) => slate.user_id);
  } catch {
    served = []; // the box still takes any id
  }
  const users = [...new Set(served)].filter((one) => one !== visitor).slice(0, 6);
  const link = (one, text) => h("a", { href: `#user/${encodeURIComponent(one)}` }, text);
  place.replaceChildren(visitor ? link(visitor, `you (${visitor})`) : "", ...(users.length ? ["served last ", ...users.map((one) => link(one, one))] : []));
}

function plurals(name) {
  return name === "negative" ? "negative acts" : `${name}s`;
}

function sum(parts) {
  return parts ? Object.values(parts).reduce((all, one) => all + one, 0) : null;
}
