// Posteriors drawn as densities: Beta(alpha, beta) on a small canvas, gliding from what was to what is.
import { glide } from "./cards.js";
import { h } from "./dom.js";
import { color, onTheme } from "./theme.js";

const POINTS = 140;
const NOTICED = 0.01; // a change of alpha or beta that is worth gliding

// Log of the density of Beta(alpha, beta) at x, up to a constant.
function logBeta(x, alpha, beta) {
  return (alpha - 1) * Math.log(x) + (beta - 1) * Math.log(1 - x);
}

// Heights 0 to 1 of the density over (0, high), the highest of them 1.
export function heights(alpha, beta, high) {
  const logs = Array.from({ length: POINTS }, (_, k) => logBeta(((k + 0.5) / POINTS) * Math.min(high, 1 - 1e-9), alpha, beta));
  const top = Math.max(...logs);
  return logs.map((value) => Math.exp(value - top));
}

/* A canvas of one posterior. `.set({alpha, beta, mean, low, high}, top)`: glides there; the pale outline stays as it was
   when first drawn, so that one sees the density contract. `top`: right end of the axis. */
export class Density {
  constructor({ height = 34, token = "s1" } = {}) {
    this.canvas = h("canvas", { class: "density", role: "img", "aria-label": "posterior" });
    this.canvas.style.height = `${height}px`;
    Object.assign(this, { height, token, now: null, first: null, top: 0.2, stopGlide: null });
    this.unTheme = onTheme(() => this.paint());
  }

  set(posterior, top, words) {
    const from = this.now ?? posterior;
    const fromTop = this.now ? this.top : top;
    this.first ??= posterior;
    this.canvas.setAttribute("aria-label", words);
    if (this.now && fromTop === top && ["alpha", "beta"].every((key) => Math.abs(from[key] - posterior[key]) < 1e-9)) return;
    this.stopGlide?.();
    const far = fromTop !== top || ["alpha", "beta"].some((key) => Math.abs(posterior[key] / from[key] - 1) > NOTICED);
    this.stopGlide = glide(this.now && far ? 0.8 : 0, (share) => {
      const between = (a, b) => a * (b / a) ** share; // alpha and beta grow by factors
      this.now = { ...posterior, alpha: between(from.alpha, posterior.alpha), beta: between(from.beta, posterior.beta), mean: from.mean + (posterior.mean - from.mean) * share };
      this.top = fromTop + (top - fromTop) * share;
      this.paint();
    });
  }

  paint() {
    const width = this.canvas.clientWidth;
    if (!this.now || !width) return;
    const ratio = devicePixelRatio;
    if (this.canvas.width !== Math.round(width * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(this.height * ratio);
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, this.height);
    const base = this.height - 1;
    const line = (posterior) => {
      pen.beginPath();
      pen.moveTo(0, base);
      heights(posterior.alpha, posterior.beta, this.top).forEach((value, k) => pen.lineTo(((k + 0.5) / POINTS) * width, base - value * (this.height - 5)));
      pen.lineTo(width, base);
    };
    pen.lineWidth = 1;
    pen.strokeStyle = color("line");
    pen.beginPath();
    pen.moveTo(0, base + 0.5);
    pen.lineTo(width, base + 0.5);
    pen.stroke();
    line(this.first);
    pen.setLineDash([2, 3]);
    pen.strokeStyle = color("faint");
    pen.stroke();
    pen.setLineDash([]);
    line(this.now);
    pen.fillStyle = color(this.token, 0.22);
    pen.fill();
    pen.strokeStyle = color(this.token);
    pen.lineWidth = 1.6;
    pen.stroke();
    const x = (this.now.mean / this.top) * width;
    pen.beginPath();
    pen.moveTo(x, 3);
    pen.lineTo(x, base);
    pen.lineWidth = 1.25;
    pen.strokeStyle = color("ink");
    pen.stroke();
  }

  close() {
    this.stopGlide?.();
    this.unTheme();
  }
}

// A round right end for an axis that holds `value`: 1, 2 or 5 times a power of ten.
export function axisEnd(value) {
  const ten = 10 ** Math.floor(Math.log10(Math.max(value, 1e-4)));
  return Math.min(1, [1, 1.5, 2, 3, 5, 7.5, 10].find((step) => step * ten >= value) * ten);
}
