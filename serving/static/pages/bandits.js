// Bandits: what is believed of each item as a density that contracts as people look at it, and how much is tried out.
import { bars, card, empty, refill, segments, trouble } from "../cards.js";
import { poll } from "../ask.js";
import { Density, axisEnd } from "../density.js";
import { h, say } from "../dom.js";
import { column, define, figure, inline } from "../figure.js";
import { ago, number, percent, plural } from "../format.js";
import { hue } from "../theme.js";

export const title = "Bandits";
export const lead = "Each item is an arm: what is believed of its share of clicks, how often it was tried, and the new ones on their way.";
export const json = ["/-/bandits?limit=24"];

const EVERY_S = 3;
const SORTS = [["shown", "most shown"], ["mean", "best"], ["unsure", "least sure"], ["new", "newest"]];
const LIMIT = 24;
const NEWCOMERS = 10;
const FIRST = 30; // slates that must have shown an item before it counts as explored (models/bandit)

export function open(root, { signal, sources }) {
  let sort = "shown";
  const figures = { share: figure("exploration_share"), first: figure("first_share_now"), epsilon: figure("epsilon"), new: figure("newcomers") };
  const policy = h("p", { class: "soft small" });
  const body = h("tbody");
  const axis = h("span", { class: "axis", "aria-hidden": "true" }, h("span", {}, "0 %"), h("span", {}));
  const densityHead = h("th", { scope: "col", class: "density-cell" }, "share of clicks", axis);
  const head = h("tr", {}, h("th", { scope: "col" }, "item"), define(densityHead, "posterior"), column("posterior_mean", { numeric: true, label: "believed" }), column("exposures", { numeric: true }), column("arm_share", { numeric: true, label: "slots" }));
  const table = h("div", { class: "table arms" }, h("table", {}, h("thead", {}, head), body));
  const notice = h("div", {}, empty("Asking …"));
  const exposure = bars("Exposure, by item", "arm_share", { head: ["item", "slots"], named: true });
  const unexposed = empty("Nothing to show.", "No slates yet.");
  const fresh = h("div", {});
  root.append(
    h("section", { class: "card figures", "aria-label": "Exploration" }, Object.values(figures)),
    card("What is believed of each item", { width: "two-thirds", lead: "The filled curve is the present posterior, the dashed outline what it was when you came: every outcome narrows it. Each is drawn to the same height.", aside: segments("Which items", SORTS, sort, (value) => { sort = value; again(); }) }, policy, notice, table),
    h("div", { class: "third grid nested" }, card("New items on their way", { lead: `Until ${FIRST} slates have shown an item it is tried out, within a bounded share of the slots.` }, fresh), card("Exposure", { lead: "Who of these gets the slots." }, unexposed, exposure)),
  );
  const rows = new Map();
  signal.addEventListener("abort", () => { for (const row of rows.values()) row.density.close(); });
  const watch = new ResizeObserver(() => { for (const row of rows.values()) row.density.paint(); });
  watch.observe(table);
  signal.addEventListener("abort", () => watch.disconnect());
  let top = 0;

  const again = poll(() => `/-/bandits?limit=${LIMIT}&sort=${sort}`, EVERY_S, signal, draw, (error) => notice.replaceChildren(trouble(error)));

  function draw(told) {
    sources([`/-/bandits?limit=${LIMIT}&sort=${sort}`]);
    const { exploration = {}, arms = [], newcomers = [] } = told;
    figures.share.set(percent(exploration.share, 1), { note: exploration.slots ? `of ${number(exploration.slots)} slots` : "no slates yet", n: exploration.slots ? plural(exploration.slots, "slot") : undefined, window: exploration.window_s });
    figures.first.set(percent(told.first_share, 0), { note: "at most", n: "none: chosen, not learnt" });
    figures.epsilon.set(percent(told.epsilon, 0), { note: "where the policy is epsilon", n: "none: chosen, not learnt" });
    figures.new.set(number(told.newcomers_total), { note: newcomers.length ? "shown by fewer than 30 slates" : "all known items were tried", n: "counted" });
    say(policy, (told.policy ?? []).map(([surface, name]) => `${surface === "*" ? "every surface" : surface}: ${name}`).join(" · "));
    notice.replaceChildren(...(arms.length ? [] : [empty("No item was shown yet.", "Ask for slates (the shop front does, or freshet simulate); each that is shown becomes an arm.")]));
    table.hidden = !arms.length;
    const wanted = axisEnd(1.05 * Math.max(0.01, ...arms.map((one) => one.high)));
    if (wanted > top || wanted < 0.6 * top) top = wanted;
    say(axis.lastChild, percent(top, top < 0.1 ? 1 : 0));
    const seen = arms.map((one) => {
      const row = rows.get(one.item_id) ?? armRow(one);
      rows.set(one.item_id, row);
      row.update(one);
      return row.root;
    });
    for (const [id, row] of rows) {
      if (arms.some((one) => one.item_id === id)) continue;
      row.density.close();
      rows.delete(id);
    }
    if (seen.some((row, k) => body.children[k] !== row) || seen.length !== body.children.length) refill(body, seen);
    for (const one of arms) rows.get(one.item_id).density.set(one, top, `${one.title || one.item_id}: ${percent(one.mean, 1)}, 95 % between ${percent(one.low, 1)} and ${percent(one.high, 1)}`);
    exposure.set(arms.filter((one) => one.share !== null).toSorted((a, b) => b.share - a.share).slice(0, 12).map((one) => ({ label: one.title || one.item_id, value: one.share, text: percent(one.share, 1), href: `#item/${encodeURIComponent(one.item_id)}`, n: exploration.slots ? plural(exploration.slots, "slot") : undefined })));
    exposure.hidden = !arms.length;
    unexposed.hidden = arms.length > 0;
    drawNew(newcomers, told.newcomers_total);
  }

  function armRow(one) {
    const density = new Density();
    const mean = h("b", {});
    const interval = h("span", { class: "faint" });
    const shown = h("b", {});
    const chosen = h("span", { class: "faint" });
    const share = h("td", { class: "num" });
    const exploring = h("span", { class: "chip accent", hidden: true }, "new");
    const meanCell = h("td", { class: "num two" }, mean, interval);
    const shownCell = h("td", { class: "num two" }, shown, chosen);
    const link = h("a", { href: `#item/${encodeURIComponent(one.item_id)}`, "data-key": one.item_id }, one.title || one.item_id);
    const topic = h("span", { class: "topic hued", style: { "--hue": hue(one.category || "") } }, one.category || "", exploring);
    const row = h("tr", {}, h("th", { scope: "row", class: "arm-name" }, link, topic), h("td", { class: "density-cell" }, density.canvas), meanCell, shownCell, share);
    return { root: row, density, update: (arm) => {
      say(mean, percent(arm.mean, 1));
      say(interval, `${percent(arm.low, 1).replace(" %", "")} to ${percent(arm.high, 1)}`);
      say(shown, number(arm.exposures, 0));
      say(chosen, `${number(arm.successes, 0)} chosen`);
      say(share, percent(arm.share, 1));
      meanCell.dataset.n = `${number(arm.exposures, 1)} exposures`;
      exploring.hidden = !arm.still_exploring;
    } };
  }

  function drawNew(list, all) {
    if (!list.length) return fresh.replaceChildren(empty("No new items.", `An item is new until ${FIRST} slates have shown it. PUT /v1/items/ID adds one.`));
    const row = (one) => {
      const done = Math.max(0, FIRST - one.to_go);
      const fill = h("i");
      fill.style.width = `${(100 * done) / FIRST}%`;
      return h("li", {}, h("span", { class: "line" }, h("a", { href: `#item/${encodeURIComponent(one.item_id)}`, "data-key": one.item_id }, one.title || one.item_id), define(h("b", {}, `${done} of ${FIRST}`), "to_go", { n: plural(one.shown, "slate") })), h("div", { class: "meter", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": FIRST, "aria-valuenow": done, "aria-label": `${one.title || one.item_id}: shown by ${done} of ${FIRST} slates` }, fill), h("span", { class: "faint small" }, one.first_time ? `came ${ago(one.first_time)}` : "nobody acted on it yet", " · ", inline("posterior_mean", `believed ${percent(one.mean, 1)}`, { n: `${number(one.exposures, 1)} exposures` })));
    };
    refill(fresh, h("ul", { class: "newcomers" }, list.slice(0, NEWCOMERS).map(row)), all > NEWCOMERS ? h("p", { class: "small soft" }, `and ${number(all - NEWCOMERS)} more`) : null);
  }
}
