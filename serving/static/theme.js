// Light and dark, and the colours that canvases draw with.
const root = document.documentElement;
const KEY = "freshet.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
const changed = new Set();
const resolved = new Map();
let probe = null;

const saved = localStorage.getItem(KEY);
if (saved) root.dataset.theme = saved;

function tell() {
  resolved.clear();
  for (const follower of changed) follower();
}
dark.addEventListener("change", tell);

export function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
}

// Make `button` change the theme; the choice is kept in this browser.
export function themeButton(button) {
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem(KEY, root.dataset.theme);
    tell();
  });
}

// Call `follower` after each change of theme; returns how to stop.
export function onTheme(follower) {
  changed.add(follower);
  return () => changed.delete(follower);
}

// The colour of a token ("ours") or of any CSS colour text, as the browser resolves it now; with `alpha` see-through.
export function color(name, alpha = 1) {
  const text = /^[a-z]+\d?(-[a-z]+)?$/.test(name) ? `var(--${name})` : name;
  const key = `${text}|${alpha}`;
  if (!resolved.has(key)) {
    if (!probe) {
      probe = document.createElement("span");
      probe.hidden = true;
      document.body.append(probe);
    }
    probe.style.color = alpha === 1 ? text : `color-mix(in srgb, ${text} ${100 * alpha}%, transparent)`;
    resolved.set(key, getComputedStyle(probe).color);
    if (resolved.size > 500) resolved.clear();
  }
  return resolved.get(key) ?? "gray";
}

function hashed(text) {
  let hash = 2166136261;
  for (const character of text) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  return hash >>> 0;
}

// A hue (degrees) of a name, always the same: topics keep their colour on every page.
export function hue(text) {
  return Math.round(((hashed(text) * 0.6180339887) % 1) * 360);
}

// The colour of a dot of that name in the present theme; also its shade differs, for names whose hues are near.
export function dot(text, alpha = 1) {
  const shade = 11 * ((hashed(text) >>> 9) % 3);
  return isDark() ? `hsl(${hue(text)} 55% ${52 + shade}% / ${alpha})` : `hsl(${hue(text)} 55% ${32 + shade}% / ${alpha})`;
}

export function calm() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}
