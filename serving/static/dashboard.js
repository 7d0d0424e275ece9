// The dashboard's frame: which page is open (by the address), its title, its links to the JSON, and the connection.
import { h } from "./dom.js";
import { register } from "./figure.js";
import { DEFINITIONS } from "./definitions.js";
import { clock } from "./format.js";
import { follow, frames, showStatus, watch } from "./stream.js";
import { themeButton } from "./theme.js";

const PAGES = [
  ["now", "Now"], ["learning", "Learning"], ["bandits", "Bandits"], ["user", "User"], ["item", "Item"],
  ["slates", "Slates"], ["models", "Models"], ["quality", "Quality"], ["system", "System"],
];
const $ = (id) => document.getElementById(id);
let open = null;

function address() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const argument = rest.length ? decodeURIComponent(rest.join("/")) : "";
  return PAGES.some(([known]) => known === name) ? { name, argument } : { name: "now", argument: "" };
}

const GONE = {
  lost: (since) => `The API does not answer. ${since}It goes on by itself when the API is back; freshet status says what runs.`,
  refused: (since) => `The API refuses the live figures: from another machine they need a key of scope admin, and 64 pages may watch at most. ${since}It is asked again by itself.`,
};
const gone = h("p", { class: "notice bad gone-by", role: "alert", hidden: true });
watch(({ name }) => {
  gone.hidden = !GONE[name];
  if (GONE[name]) gone.textContent = GONE[name](frames.length ? `What stands here was so at ${clock(frames[frames.length - 1].t)}. ` : "");
});

function links(json) {
  return json.map((href) => h("a", { href }, href));
}

async function show() {
  if (location.hash === "#page") return;
  const { name, argument } = address();
  for (const link of $("pages").children) {
    if (link.dataset.page === name) {
      link.setAttribute("aria-current", "page");
      if (link.parentElement.scrollWidth > link.parentElement.clientWidth) link.parentElement.scrollLeft = link.offsetLeft - 60;
    } else link.removeAttribute("aria-current");
  }
  const turned = open === null || open.name !== name;
  const first = open === null;
  open?.stop.abort();
  const stop = new AbortController();
  open = { name, stop, frame: null };
  const mine = open;
  const page = await import(`./pages/${name}.js`);
  if (open !== mine) return;
  document.title = `${page.title} · Freshet`;
  const sources = h("p", { class: "sources" });
  const root = h("div", { class: "grid" });
  $("page").replaceChildren(h("div", { class: "title" }, h("div", {}, h("h1", {}, page.title), h("p", { class: "lead" }, page.lead)), sources), gone, root);
  const tell = (json) => sources.replaceChildren("JSON ", ...links(json));
  tell(page.json);
  mine.frame = page.open(root, { argument, signal: stop.signal, sources: tell }) ?? null;
  $("page").setAttribute("aria-busy", "false");
  if (turned && !first) $("page").focus({ preventScroll: true });
  if (turned) scrollTo(0, 0);
  unfollow?.();
  unfollow = follow((last) => open?.frame?.(last));
}
let unfollow = null;

$("pages").append(...PAGES.map(([name, title]) => h("a", { href: `/dashboard#${name}`, "data-page": name }, title)));
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("page").focus();
});
register(DEFINITIONS);
themeButton($("theme"));
showStatus($("status"));
addEventListener("hashchange", show);
show();
