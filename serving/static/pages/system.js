// System: what runs and how big it is, the topics, the events that could not be folded, and every setting.
import { bars, card, confirmed, empty, facts, refill, trouble } from "../cards.js";
import { ask, poll, post } from "../ask.js";
import { h } from "../dom.js";
import { column, figure } from "../figure.js";
import { ago, bytes, moment, number, plural, span, words } from "../format.js";

export const title = "System";
export const lead = "Processes, topics, memory, what could not be folded, and every setting.";
export const json = ["/-/state", "/-/topics", "/-/dead-letters?limit=50", "/-/settings"];

const STATE_S = 3;
const TOPICS_S = 10;
const LETTERS_S = 5;

export function open(root, { signal }) {
  const figures = { uptime: figure("uptime"), redis: figure("redis_mb"), users: figure("kept_users"), items: figure("kept_items"), letters: figure("dead_letters"), delay: figure("loop_delay") };
  const state = h("div", { class: "notice", role: "status" }, "Asking …");
  const letters = h("div", {}, empty("Asking …"));
  const letterActs = h("div", { class: "controls" });
  const topics = h("div", {}, empty("Asking Kafka …"));
  const memory = bars("Redis memory, by what it is", "redis_kind", { head: ["what", "MB"] });
  const processes = bars("Memory of the processes", "process_mb", { head: ["process", "MB"] });
  const buffers = bars("Buffers of this API process", "buffer", { head: ["buffer", "used of bound"] });
  const here = h("div", {});
  const settings = h("div", {}, empty("Asking …"));
  const find = h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting", oninput: () => sift() });
  const changedOnly = h("input", { type: "checkbox", onchange: () => sift() });
  root.append(
    h("section", { class: "card figures six", "aria-label": "This system" }, Object.values(figures)),
    state,
    card("Dead letters", { lead: "Events that could not be folded, each with its reason. Nothing is lost: mend the cause, then replay them.", aside: letterActs }, letters),
    card("Topics", { width: "two-thirds", lead: "The logs in Kafka, and the next offset of each partition." }, topics),
    card("Redis", { width: "third", lead: "What the state takes." }, memory),
    card("Processes", { width: "third", lead: "Resident memory, as each told it last." }, processes),
    card("Buffers", { width: "third", lead: "What this API process holds, of what it may." }, buffers),
    card("This API process", { width: "third" }, here),
    card("Settings", { lead: "As this process started. Each is an environment variable too.", aside: h("div", { class: "controls" }, find, h("label", {}, changedOnly, "changed only")) }, settings),
  );

  poll("/-/state", STATE_S, signal, (told) => {
    const { snapshot = {}, impressions = {}, overload = {}, memory: held = {} } = told;
    const redis = held.redis ?? {};
    figures.uptime.set(span(told.uptime_s).split(" ")[0], { note: "since this process started", n: "exact" });
    figures.uptime.querySelector(".value span").textContent = span(told.uptime_s).split(" ")[1] ?? "";
    figures.redis.set(number(redis.mb?.total, 1), { note: "all namespaces of this server", n: "exact" });
    figures.users.set(number(redis.users), { note: "profiles in Redis", n: "counted" });
    figures.items.set(number(redis.items), { note: `${number(redis.learnt)} with learnt vectors`, n: "counted" });
    figures.letters.set(number(told.dead_letters), { note: told.dead_letters ? "see below" : "everything was folded", tone: told.dead_letters ? "warn" : "", n: "counted" });
    figures.delay.set(number(overload.loop_delay_ms, 1), { note: `${number(Object.values(overload.shed ?? {}).reduce((sum, n) => sum + n, 0))} requests turned away so far`, n: "moving mean" });
    state.className = `notice ${told.ready ? "good" : "bad"}`;
    const text = told.ready ? "Ready: the arrays are loaded, Kafka and Redis answer." : `Not ready: ${told.reasons.join("; ")}`;
    if (state.textContent !== text) state.textContent = text;
    memory.set(Object.entries(redis.mb ?? {}).filter(([name]) => name !== "total").sort(([, a], [, b]) => b - a).map(([name, value]) => ({ label: words(name), value, text: number(value, 2) })));
    processes.set(Object.entries(held.process_mb ?? {}).map(([name, value]) => ({ label: name, value, text: number(value, 0) })));
    buffers.set(Object.entries(told.buffers ?? {}).map(([name, { used, bound }]) => ({ label: words(name), value: used / bound, text: `${number(used)} / ${bound > 1e6 ? bytes(bound) : number(bound)}` })), { max: 1 });
    here.replaceChildren(facts([
      ["snapshot_rows", "item rows", number(snapshot.items?.rows)], ["reloads", "reloads", number(snapshot.reloads)], ["bad_rows", "unreadable rows", number(snapshot.bad)],
      ["impressions_appended", "impressions logged", number(impressions.appended)], ["impressions_dropped", "dropped", number((impressions.dropped ?? 0) + (impressions.failed ?? 0))],
      ["unreadable", "unreadable profiles", number(Object.values(told.unreadable_profiles ?? {}).reduce((sum, n) => sum + n, 0))],
      ["keys", "API keys", told.keys?.on ? number(told.keys.known) : "off: loopback only"], ["generation", "generation of keys", number(snapshot.generation)],
    ]));
  }, (error) => {
    state.className = "";
    state.replaceChildren(trouble(error));
  });

  poll("/-/topics", TOPICS_S, signal, ({ topics: rows }) => {
    const row = (one) => h("tr", {}, h("th", { scope: "row" }, one.topic), h("td", { class: "num" }, number(one.partitions), one.partitions === one.expected ? "" : h("span", { class: "chip bad" }, `expected ${one.expected}`)),
      h("td", { class: "num" }, number(one.end_offsets.reduce((sum, n) => sum + n, 0))), h("td", { class: "offsets mono" }, one.end_offsets.map((n) => number(n)).join(" · ")), h("td", { class: "small soft configuration" }, Object.entries(one.config).map(([name, value]) => `${name}=${value}`).join(", ")));
    const head = h("tr", {}, h("th", { scope: "col" }, "topic"), column("partitions", { numeric: true }), column("records", { numeric: true }), column("end_offsets"), h("th", { scope: "col" }, "configuration"));
    refill(topics, h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Topics" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows.map(row)))));
  }, (error) => topics.replaceChildren(trouble(error)));

  const again = poll("/-/dead-letters?limit=50", LETTERS_S, signal, ({ total, letters: rows }) => {
    const waiting = rows.filter((one) => !one.replayed);
    letterActs.replaceChildren(...(waiting.length ? [h("button", { class: "quiet", type: "button", "data-key": "all", onclick: () => replay({ all: true }, `all ${number(total)} dead letters`) }, "Replay all")] : []));
    if (!rows.length) return letters.replaceChildren(empty("No dead letters.", "Whatever came in so far was applied, or was a duplicate."));
    const row = (one) => h("tr", {}, h("td", {}, h("span", { title: ago(one.time) }, moment(one.time))), h("td", { class: "mono small" }, `${one.topic} ${one.partition}@${one.offset}`), h("td", {}, one.reason), h("td", { class: "excerpt mono small" }, one.excerpt),
      h("td", { class: "num" }, one.replayed ? h("span", { class: "chip good" }, "replayed") : h("button", { class: "act", type: "button", "data-key": String(one.id), onclick: () => replay({ ids: [one.id] }, "this dead letter") }, "Replay")));
    const head = h("tr", {}, column("letter_time"), column("letter_place"), h("th", { scope: "col" }, "reason"), h("th", { scope: "col" }, "what it said"), h("td", {}));
    refill(letters, h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Dead letters" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows.map(row)))), total > rows.length ? h("p", { class: "small soft" }, `The newest ${rows.length} of ${number(total)}.`) : "");
  }, (error) => letters.replaceChildren(trouble(error)));

  function replay(what, name) {
    confirmed({ title: `Replay ${name}?`, text: "The events are sent to the log again and folded as if they came now; their time stays what it was. Where the cause is not mended they come back here.", button: "Replay" }, async () => {
      const { replayed, refused = [] } = await post("/-/dead-letters/replay", what);
      again();
      return `${plural(Array.isArray(replayed) ? replayed.length : replayed, "event")} sent to the log again.${refused.length ? ` ${plural(refused.length, "letter")} refused: ${refused[0].why}` : ""}`;
    });
  }

  let rows = [];
  function sift() {
    const wanted = find.value.trim().toLowerCase();
    for (const { one, root: row } of rows) row.hidden = (wanted && !`${one.name} ${one.help}`.toLowerCase().includes(wanted)) || (changedOnly.checked && String(one.value) === String(one.default));
  }
  ask("/-/settings", { signal }).then((list) => {
    rows = list.map((one) => {
      const changed = String(one.value) !== String(one.default);
      return { one, root: h("tr", {}, h("th", { scope: "row" }, h("code", {}, one.environment)), h("td", {}, h("span", { class: changed ? "name" : "" }, said(one.value)), changed ? h("span", { class: "faint" }, `default ${said(one.default)}`) : ""), h("td", { class: "soft" }, one.help)) };
    });
    settings.replaceChildren(h("div", { class: "table settings", tabindex: "0", role: "region", "aria-label": "Settings" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"), h("th", { scope: "col" }, "value"), h("th", { scope: "col" }, "what for"))), h("tbody", {}, rows.map(({ root: row }) => row)))));
  }).catch((error) => !signal.aborted && settings.replaceChildren(trouble(error)));
}

function said(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text === "" ? "(empty)" : text;
}
