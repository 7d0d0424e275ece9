// The crowd: how many simulated people there are, and a topic that surges, until the slates show that it was noticed.
import { ask, poll, post } from "./ask.js";
import { TimeChart } from "./charts.js";
import { h, say } from "./dom.js";
import { inline, register, setInline } from "./figure.js";
import { number, percent } from "./format.js";
import { column, latest, times } from "./stream.js";

const ASK_S = 5;
const SHOWN_S = 300;
const LATEST = "the latest 100 slates";

register({
  people: { name: "Simulated people", what: "People who may come now; each asks as often as before, so twice as many ask for twice as many slates.", unit: "people", window: "this moment", n: "counted" },
  slates_s: { name: "Slates", what: "Slates that the simulated people were served.", unit: "per second", window: 10, n: "counted" },
  share: { name: "Share of the slots", what: "Of all slots that simulated people were served, those with an item of this topic.", unit: "share", window: LATEST, n: "up to 1,000 slots" },
  share_best: { name: "Share in the best slates", what: "The same share in the best slates there are, which only the simulated world knows: it follows a surge at once.", unit: "share", window: LATEST, n: "up to 1,000 slots" },
  base: { name: "Share before", what: "The topic's share of the slots in the minute before the surge.", unit: "share", window: "60 s before the surge", n: "at least 30 slates" },
  noticed: { name: "Noticed after", what: "From the beginning of the surge to the first slate at which the topic's share of all slots served since then (at least 30 slates) is above its share of the minute before by 4 standard errors over people, and by 1 % of the slots.", unit: "seconds", window: "since the surge began", n: "all slates since" },
  surge: { name: "A surge", what: "The simulated world's truth changes: everybody is 7.4 times as likely (in odds) to click items of the topic; that halves every two minutes and ends after ten. Visitors also find more without us.", unit: "factor of the odds", window: "10 minutes", n: "everybody" },
});

const people = (count) => `${number(count)} ${count === 1 ? "person" : "people"}`;

export class Crowd {
  constructor(place) {
    this.said = null; // the server's answer
    this.wanted = null; // people asked for and not yet there
    this.slider = h("input", { type: "range", id: "people", min: 0, max: 500, step: 10, value: 0, "aria-describedby": "people-now" });
    this.people = inline("people", "–");
    this.rate = inline("slates_s", "–");
    this.topic = h("select", { id: "topic" });
    this.button = h("button", { class: "button", type: "button" }, "Make it trend");
    this.news = h("p", { class: "news-line", role: "status" });
    this.note = h("p", { class: "empty", id: "no-crowd", hidden: true });
    this.chart = new TimeChart({
      title: "Share of the slots of the topic", height: 200, format: (value) => percent(value),
      series: [{ label: "best slates", color: "oracle", def: "share_best", dash: [3, 5] }, { label: "served", color: "ours", def: "share", width: 2.5 }, { label: "before the surge", color: "s3", def: "base", dash: [6, 4] }],
      empty: "Shares are told while simulated people are here.",
    });
    this.controls = h("div", { class: "controls" },
      h("div", { class: "people" }, h("label", { for: "people" }, "Crowd"), this.slider, h("p", { id: "people-now" }, this.people, " · ", this.rate)),
      h("div", { class: "trend" }, h("label", { for: "topic" }, "Topic"), this.topic, this.button));
    place.append(
      h("h2", { id: "crowd-title" }, "A crowd, and a trend"),
      h("p", { class: "lead" }, "Change how many simulated people come. Or let a topic ", inline("surge", "surge"), ": suddenly everybody wants it, nobody tells Freshet, and you see how soon it is noticed."),
      this.controls, this.note, this.news, this.chart.root);
    this.slider.addEventListener("input", () => this.slide());
    this.slider.addEventListener("change", () => this.wish({ users: Number(this.slider.value) }));
    this.button.addEventListener("click", () => this.wish({ surge: this.topic.value }));
    this.topic.addEventListener("change", () => this.draw());
    poll("/-/crowd", ASK_S, new AbortController().signal, (body) => this.take(body), (error) => this.absent(error.status === 404 ? "This server cannot call a crowd." : `The crowd is not to be asked: ${error.message}`));
  }

  absent(text) {
    say(this.note, text);
    this.note.hidden = !text;
    this.controls.hidden = this.chart.root.hidden = Boolean(text);
  }

  take(body) {
    this.said = body;
    this.absent(body.running ? "" : "No simulated people are here. Start some: freshet simulate");
    if (!body.running) return;
    const names = [...body.topics].sort();
    if ([...this.topic.options].map((option) => option.value).join() !== names.join()) {
      const kept = this.topic.value;
      this.topic.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
      this.topic.value = body.surge?.topic ?? (names.includes(kept) ? kept : names[Math.floor(names.length * Math.random())]);
    }
    if (this.wanted !== null && body.users === this.wanted) this.wanted = null;
    if (this.wanted === null && document.activeElement !== this.slider) this.slider.value = body.users;
    this.draw();
  }

  slide() {
    this.wanted = Number(this.slider.value);
    setInline(this.people, `${people(this.wanted)} called`);
  }

  async wish(body) {
    this.button.disabled = true;
    try {
      this.take(await post("/-/crowd", body));
    } catch (error) {
      say(this.news, `That was not taken: ${error.message}`);
    }
    this.button.disabled = false;
    setTimeout(async () => this.take(await ask("/-/crowd")), 1500); // people hear of it within a second
  }

  draw() {
    const world = latest((frame) => frame.world ?? null, 5);
    if (!this.said?.running || !world) return;
    if (this.wanted === null) setInline(this.people, people(world.users));
    setInline(this.rate, `${this.slatesPerSecond()} slates a second`);
    const surge = this.said.surge;
    const place = this.said.topics.indexOf(surge && world.surge_t ? surge.topic : this.topic.value);
    const at = times(SHOWN_S);
    const told = (name) => column((frame) => frame.world?.[name], SHOWN_S);
    const on = Boolean(surge && world.surge_t);
    const only = (name) => (on ? column((frame) => (frame.world?.surge_t === world.surge_t ? frame.world[name] : null), SHOWN_S) : at.map(() => null));
    const marks = on ? [{ t: world.surge_t, text: "surge" }, ...(world.noticed_s === undefined ? [] : [{ t: world.surge_t + world.noticed_s, text: "noticed" }])] : [];
    this.chart.draw(at, [only("surge_best"), told(`share_${place}`), only("surge_base")], marks);
    this.tell(on ? surge.topic : null, world);
  }

  slatesPerSecond() {
    const at = times(10);
    const counts = column((frame) => frame.world?.slates, 10);
    const first = counts.findIndex((count) => count !== null);
    const last = counts.findLastIndex((count) => count !== null);
    return last > first ? number((counts[last] - counts[first]) / (at[last] - at[first]), 1) : "–";
  }

  tell(topic, world) {
    const key = topic === null ? "" : `${topic} ${world.noticed_s ?? "waiting"} ${world.surge_base === undefined}`;
    if (key === this.told) return;
    this.told = key;
    if (topic === null) this.news.replaceChildren();
    else if (world.noticed_s !== undefined) {
      this.news.replaceChildren(h("b", {}, topic), " surges. Noticed after ", inline("noticed", `${number(world.noticed_s, 1)} s`), ": its share of the slots was ", inline("base", percent(world.surge_base)), " in the minute before.");
    } else if (world.surge_base === undefined) this.news.replaceChildren(h("b", {}, topic), " surges. Too few slates were served before it to say when it is noticed.");
    else this.news.replaceChildren(h("b", {}, topic), " surges; not noticed yet. Its share of the slots was ", inline("base", percent(world.surge_base)), " before.");
  }
}
