// The live stream (/-/live): one frame a second, resumed where it broke, the last 15 minutes kept.
const KEEP = 900;
const HIDDEN_S = 30; // a page nobody sees lets its connection go: browsers give a host only six

export const frames = [];
const followers = new Set();
const watchers = new Set();
let source = null;
let state = { name: "wait", text: "connecting" };
let waiting = false;
let pause = 0;
let retry = 0;

function tell(name, text) {
  if (state.name === name && state.text === text) return;
  state = { name, text };
  for (const watcher of watchers) watcher(state);
}

function draw() {
  waiting = false;
  if (document.hidden || !frames.length) return;
  const last = frames[frames.length - 1];
  for (const follower of followers) follower(last);
  if (source) tell(...(last.api?.degraded ? ["degraded", "degraded"] : ["live", "live"]));
}

function ask() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(draw);
}

function listen() {
  clearTimeout(retry);
  const last = frames[frames.length - 1];
  source = new EventSource(last ? `/-/live?after=${last.t}` : "/-/live");
  source.onmessage = (message) => {
    const frame = JSON.parse(message.data);
    if (frames.length && frame.t <= frames[frames.length - 1].t) return;
    frames.push(frame);
    if (frames.length > KEEP) frames.shift();
    if (!document.hidden) ask();
  };
  source.onerror = () => {
    const refused = source.readyState === EventSource.CLOSED;
    tell(refused ? "refused" : "lost", refused ? "the server refused; trying again" : "connection lost; trying again");
    if (refused) retry = setTimeout(listen, 3000);
  };
}

function seen() {
  clearTimeout(pause);
  if (document.hidden) {
    pause = setTimeout(() => {
      source?.close();
      clearTimeout(retry);
      source = null;
    }, 1000 * HIDDEN_S);
  } else {
    if (!source || source.readyState === EventSource.CLOSED) listen();
    ask();
  }
}

// Call `follower(last frame)` at most once a second while the page is seen; returns how to stop.
export function follow(follower) {
  followers.add(follower);
  if (!source) {
    document.addEventListener("visibilitychange", seen);
    listen();
  } else ask();
  return () => followers.delete(follower);
}

// Call `watcher({name, text})` now and whenever the connection changes: wait, live, degraded, lost, refused. Returns how to stop.
export function watch(watcher) {
  watchers.add(watcher);
  watcher(state);
  return () => watchers.delete(watcher);
}

// Keep an element `<span class="status"><i></i><b></b></span>` true to the connection.
export function showStatus(element) {
  watch(({ name, text }) => {
    element.dataset.state = name;
    element.querySelector("b").textContent = text;
  });
}

// The newest value that `read(frame)` finds within the last `within` seconds, else null.
export function latest(read, within = 10) {
  const since = (frames[frames.length - 1]?.t ?? 0) - within;
  for (let k = frames.length - 1; k >= 0 && frames[k].t > since; k--) {
    const value = read(frames[k]);
    if (value !== null && value !== undefined) return value;
  }
  return null;
}

// One number per kept second (null where not told), the last `within` seconds.
export function column(read, within = KEEP) {
  const since = (frames[frames.length - 1]?.t ?? 0) - within;
  return frames.filter((frame) => frame.t > since).map((frame) => read(frame) ?? null);
}

export function times(within = KEEP) {
  const since = (frames[frames.length - 1]?.t ?? 0) - within;
  return frames.filter((frame) => frame.t > since).map((frame) => frame.t);
}

// Sum of what `read(frame)` tells over the last `within` seconds; null where nothing was told.
export function total(read, within) {
  const told = column(read, within).filter((value) => value !== null);
  return told.length ? told.reduce((sum, value) => sum + value, 0) : null;
}
