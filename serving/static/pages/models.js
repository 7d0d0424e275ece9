// Models: what is served, the versions and their figures, staying on one or going back, and weights a person can read.
import { bars, card, confirmed, empty, facts, refill, segments, trouble } from "../cards.js";
import { post, poll } from "../ask.js";
import { h } from "../dom.js";
import { column, figure } from "../figure.js";
import { ago, bytes, moment, number, percent, plural, signed, words } from "../format.js";

export const title = "Models";
export const lead = "Weights are learnt about once a second; now and then they are kept as a version, which you can stay on or go back to.";
export const json = ["/-/models"];

const EVERY_S = 3;
const MOST = 14;

export function open(root, { signal }) {
  const figures = { step: figure("served_step"), behind: figure("steps_behind"), version: figure("version"), vectors: figure("vectors"), scorer: figure("scorer"), refused: figure("refused") };
  const notice = h("div", {});
  const versions = h("div", {});
  const notes = h("div", {});
  const weights = bars("Weights of the ranker's features", "feature_weight", { head: ["feature", "weight"] });
  const heads = bars("Weights of what people may do", "head_weight", { head: ["outcome", "weight"] });
  const mixture = bars("Popularity the encoder starts from", "mixture", { head: ["half-life", "share"] });
  const more = h("div", {});
  let all = false;
  let body = null;
  const acts = h("div", { class: "controls" },
    h("button", { class: "quiet", type: "button", onclick: () => confirmed({ title: "Keep a version now?", text: "The learner writes its weights of this moment as a version, at the end of its next step. Nothing else changes.", button: "Keep a version" }, () => act("save")) }, "Keep a version now"));
  const unpin = h("button", { class: "quiet", type: "button", hidden: true, onclick: () => confirmed({ title: "Learn and serve the newest again?", text: "The pin ends: what has been learnt since is served again, within a second or two.", button: "End the pin" }, () => act("unpin")) }, "End the pin");
  acts.append(unpin);
  root.append(
    h("section", { class: "card figures six", "aria-label": "What is served" }, Object.values(figures)),
    notice,
    card("Versions", { lead: "Newest first. To stay on one: pin it; learning goes on beside it. To go back: the weights become those of the version and learning goes on from there.", aside: acts }, versions),
    card("What happened to the weights", { width: "half", lead: "Refused steps, pins, roll-backs: as the learner logged them." }, notes),
    card("Parts", { width: "half" }, more),
    card("Features of the linear ranker", { width: "half", lead: "By size of weight: what makes an item rise or fall, all else equal.", aside: segments("How many features", [[false, `top ${MOST}`], [true, "all"]], all, (value) => { all = value; if (body) drawWeights(); }) }, weights),
    h("div", { class: "half grid nested" }, card("What an outcome is worth", { lead: "An item's score is the sum of weight times chance, over what may follow." }, heads), card("Popularity the encoder starts from", { lead: "How much of its prior comes from each half-life." }, mixture)),
  );

  async function act(verb, version) {
    const told = await post(`/-/models/${verb}`, version === undefined ? {} : { version });
    again();
    return told.done ? `Done: the learner obeyed (offset ${told.offset} of the log).` : `Recorded at offset ${told.offset} of the log; the learner follows at the end of its next step.`;
  }

  const again = poll("/-/models", EVERY_S, signal, (told) => {
    body = told;
    notice.replaceChildren();
    draw();
  }, (error) => notice.replaceChildren(trouble(error)));

  function draw() {
    const learnt = body.learnt?.step;
    figures.step.set(number(body.step), { note: `log offset ${number(body.position)}`, n: "exact" });
    figures.behind.set(number(learnt === undefined ? null : Math.max(0, learnt - body.step)), { note: `learnt up to step ${number(learnt)}`, n: "exact" });
    const kept = body.versions ?? [];
    const newest = kept.filter((one) => !one.refused).reduce((best, one) => (best === null || one.version > best.version ? one : best), null);
    figures.version.set(number(newest?.version), { note: newest ? ago(newest.made) : "none kept yet", n: plural(kept.length, "version") });
    figures.vectors.set(number(body.vectors?.rows), { note: `${number(body.vectors?.dim)} numbers each`, n: "exact" });
    const loss = body.ranker_loss ?? {};
    figures.scorer.set(body.scorer ?? "–", { note: `loss: linear ${number(loss.linear, 3)}, network ${number(loss.network, 3)}`, n: "moving means" });
    figures.refused.set(number(body.refused), { note: body.refused ? "see below" : "all were sound", tone: body.refused ? "warn" : "", n: "counted" });
    unpin.hidden = !body.pinned;
    drawVersions(kept);
    drawNotes();
    drawWeights();
    heads.set(Object.entries(body.head_weights ?? {}).map(([name, value]) => ({ label: words(name), value: Math.abs(value), text: signed(value, 1), color: value < 0 ? "var(--s2)" : "var(--s1)" })));
    mixture.set(Object.entries(body.prior_mixture ?? {}).map(([name, value]) => ({ label: name === "none" ? "all time" : name, value, text: percent(value, 0) })));
    const { calibration = {}, last_layer: layer = {} } = body;
    more.replaceChildren(facts([
      ["calibration_slates", "calibrated on", plural(calibration.slates ?? 0, "slate")], ["calibration_slope", "slope", number(calibration.slope, 3)], ["calibration_offset", "offset", number(calibration.offset, 3)],
      ["layer_slates", "last layer learnt from", plural(layer.slates ?? 0, "slate")], ["layer_variance", "its variance", number(layer.variance, 4)], ["layer_norm", "its norm", number(layer.norm, 3)],
      ["policy", "policy by surface", (body.policy ?? []).map(([surface, policy]) => `${surface}: ${policy}`).join(", ") || "–"], ["first_share", "first impressions", percent(body.first_share)], ["epsilon", "epsilon", number(body.epsilon)],
    ]));
  }

  function drawVersions(kept) {
    if (!kept.length) return versions.replaceChildren(empty("No version yet.", "One is kept every 100,000 examples or five minutes, or now: by the button, or freshet models save."));
    const names = [...new Set(kept.flatMap((one) => Object.keys(one.metrics)))].slice(0, 5);
    const row = (one) => {
      const state = body.pinned === one.version ? h("span", { class: "chip accent" }, "pinned") : one.refused ? h("span", { class: "chip bad", title: String(one.refused) }, "refused") : one.version === body.step ? h("span", { class: "chip good" }, "served") : null;
      const ask = (verb, words, text) => h("button", { class: "act", type: "button", "data-key": `${verb}-${one.version}`, onclick: () => confirmed({ title: `${words} version ${one.version}?`, text, button: words, danger: verb === "rollback" }, () => act(verb, one.version)) }, verb === "pin" ? "Pin" : "Roll back");
      const buttons = one.refused ? null : h("span", { class: "controls tight" }, ask("pin", "Pin", "Slates are drawn with these weights until the pin ends. Learning goes on beside it, unserved."), ask("rollback", "Roll back to", "The learner's weights become those of this version; what was learnt since is left out, and learning goes on from here. It cannot be undone, save by a roll-back to a later version."));
      return h("tr", { class: body.pinned === one.version ? "picked" : "" }, h("th", { scope: "row", class: "num" }, number(one.version)), h("td", {}, moment(one.made)), h("td", { class: "num" }, number(one.parent)), h("td", { class: "num" }, number(one.next)), h("td", { class: "num" }, number(one.items)), h("td", { class: "num" }, bytes(one.bytes)),
        names.map((name) => h("td", { class: "num" }, number(one.metrics[name]))), h("td", {}, state), h("td", { class: "num" }, buttons));
    };
    const head = h("tr", {}, column("version", { numeric: true }), column("version_time"), column("version_parent", { numeric: true }), column("version_offset", { numeric: true }), column("version_items", { numeric: true }), column("version_bytes", { numeric: true }), names.map((name) => column("version_figure", { numeric: true, label: words(name) })), h("th", { scope: "col" }, "state"), h("td", {}));
    refill(versions, h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Versions" }, h("table", {}, h("thead", {}, head), h("tbody", {}, kept.toSorted((a, b) => b.version - a.version).map(row)))));
  }

  function drawNotes() {
    const told = body.notes ?? [];
    if (!told.length) return notes.replaceChildren(empty("Nothing out of the ordinary.", "A step that made numbers unsound, a pin or a roll-back would be told here."));
    notes.replaceChildren(h("ul", { class: "news", tabindex: "0", "aria-label": "What happened to the weights" }, told.toReversed().map((one) => h("li", {}, h("span", { class: "faint" }, `step ${number(one.step)}`), h("span", {}, one.note)))));
  }

  function drawWeights() {
    const list = Object.entries(body.ranker ?? {}).sort(([, a], [, b]) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, all ? undefined : MOST);
    weights.set(list.map(([name, one]) => ({ label: words(name), value: Math.abs(one.weight), text: signed(one.weight, 3), color: one.weight < 0 ? "var(--s2)" : "var(--s1)" })));
  }
}
