// Freshet's beacon, without dependencies: clicks, views and reading time of the elements with data-item, in batches, each
// event with an id, so that what is sent twice counts once. How to use it: the README, section "Beacon".
{
  const script = document.currentScript;
  const { key, surface } = script.dataset;
  const url = new URL("/v1/events", script.dataset.api ?? script.src);
  const own = url.origin === location.origin && !key; // sendBeacon carries no key, and no JSON to other origins
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const stored = () => { try { return (localStorage["freshet.user"] ??= `anon-${random()}`); } catch { return `anon-${random()}`; } };
  const user = script.dataset.user || stored();
  const inView = new Set(), seen = new Set(), since = new Map(); // elements; items of slates; element -> ms
  let queue = [], busy = null, wait = 0, token = null;

  function send(event) {
    queue = [...queue, { user_id: user, surface, ts: Date.now() / 1000, event_id: random(), ...event }].slice(-1000);
  }
  const post = (events) => fetch(url, { method: "POST", keepalive: true, credentials: own ? "same-origin" : "omit", headers: { "content-type": "application/json", ...(key && { "x-api-key": key }) }, body: JSON.stringify(events) });
  async function deliver() {
    while (queue.length && Date.now() >= wait) {
      const events = queue.slice(0, 50); // a page that ends may have 64 kB under way
      const answer = await post(events).catch(() => null);
      if (!answer || answer.status === 429 || answer.status >= 500) wait = Date.now() + 1000 * (Number(answer?.headers.get("retry-after")) || 5);
      else queue = queue.filter((event) => !events.includes(event));
      if (answer?.ok) token = (await answer.json()).token ?? token;
      else if (answer) console.warn("Freshet did not take events:", await answer.text());
    }
    return token; // for after= of the next lookup
  }
  const flush = () => (busy ??= deliver().finally(() => (busy = null)));

  const about = (element) => ({ item_id: element.dataset.item, slate_id: element.closest("[data-slate]")?.dataset.slate, position: element.dataset.position && Number(element.dataset.position) });
  function look(element) { // in view for a second: seen, once in each slate
    const mark = JSON.stringify(about(element));
    if (inView.has(element) && !document.hidden && !seen.has(mark)) send({ type: "view", ...about(element) }), seen.add(mark);
  }
  function open(element) {
    setTimeout(look, 1000, element);
    if ("dwell" in element.dataset && !document.hidden) since.set(element, performance.now());
  }
  function close(element) { // less than 3 s would say "not for me", also where only the tab was changed: not told
    const seconds = Math.min(3600, (performance.now() - since.get(element)) / 1000);
    if (since.delete(element) && seconds >= 3) send({ type: "dwell", ...about(element), seconds: Math.round(10 * seconds) / 10 });
  }
  const eye = new IntersectionObserver((entries) => {
    for (const { target, intersectionRatio, intersectionRect } of entries) {
      const visible = intersectionRatio >= 0.5 || intersectionRect.height >= innerHeight / 2;
      if (visible === inView.has(target)) continue;
      if (visible) inView.add(target), open(target);
      else inView.delete(target), close(target);
    }
  }, { threshold: [0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1] });
  const watch = () => document.querySelectorAll("[data-item]").forEach((element) => eye.observe(element));

  addEventListener("click", ({ target }) => {
    const element = target.closest("[data-item]"), name = target.closest("[data-action]")?.dataset.action;
    if (element && name) send({ type: "action", name, ...about(element) });
    else if (element && !("dwell" in element.dataset)) send({ type: "click", ...about(element) });
  }, true);
  document.addEventListener("visibilitychange", () => {
    inView.forEach(document.hidden ? close : open);
    flush();
  });
  addEventListener("pagehide", () => {
    inView.forEach(close);
    for (; queue.length; queue = queue.slice(50)) if (!own || !navigator.sendBeacon(url, new Blob([JSON.stringify(queue.slice(0, 50))], { type: "application/json" }))) post(queue.slice(0, 50));
  });
  new MutationObserver(watch).observe(document, { childList: true, subtree: true });
  setInterval(flush, 2000);
  watch();
  window.freshet = { user, send, flush };
}
