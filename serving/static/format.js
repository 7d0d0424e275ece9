// Figures as text: the same everywhere, a dash for what is not told yet.
export const NONE = "–";
const MINUS = "−";

const told = (value) => typeof value === "number" && Number.isFinite(value);

// With `digits` decimals; without: as many as a value of that size needs.
export function number(value, digits) {
  if (!told(value)) return NONE;
  const size = Math.abs(value);
  const places = digits ?? (Number.isInteger(value) || size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3);
  const text = size.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  return value < 0 && Number(text.replaceAll(",", "")) !== 0 ? MINUS + text : text;
}

export function signed(value, digits) {
  return told(value) ? (value >= 0 ? "+" : "") + number(value, digits) : NONE;
}

// Milliseconds without their unit.
export function ms(value) {
  return told(value) ? number(value, value < 10 ? 1 : 0) : NONE;
}

// A share of one, in percent.
export function percent(value, digits) {
  if (!told(value)) return NONE;
  const kept = digits ?? (Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0);
  const least = 10 ** -kept;
  return value > 0 && 200 * value < least ? `< ${number(least, kept)} %` : `${number(100 * value, kept)} %`; // seldom is not never
}

export function bytes(value) {
  if (!told(value)) return NONE;
  const steps = ["B", "kB", "MB", "GB"];
  const step = value < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  return `${number(value / 1000 ** step, step && value / 1000 ** step < 10 ? 1 : 0)} ${steps[step]}`;
}

// A span of seconds: "12 s", "3 min", "2 h", "5 d".
export function span(seconds) {
  if (!told(seconds)) return NONE;
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= 1.5 * size) return `${number(seconds / size, seconds / size < 10 ? 1 : 0).replace(/\.0$/, "")} ${unit}`;
  return `${number(seconds, seconds < 10 && !Number.isInteger(seconds) ? 1 : 0)} s`;
}

// How long ago, of a time in seconds since the epoch.
export function ago(time, now = Date.now() / 1000) {
  if (!told(time)) return NONE;
  return now - time < 1.5 ? "now" : `${span(Math.round(now - time))} ago`;
}

// The time of day of seconds since the epoch.
export function clock(time) {
  return told(time) ? new Date(time * 1000).toLocaleTimeString("en-GB") : NONE;
}

export function moment(time) {
  return told(time) ? new Date(time * 1000).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" }) : NONE;
}

// A machine's name for people: "long_co_visitation" -> "long co visitation".
export function words(name) {
  return String(name ?? "").replaceAll("_", " ");
}

export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}
