// How things are shown: colours, times, numbers, and elements made of text alone.

const PALETTE = ["#5b8dd6", "#3fa7a0", "#9a7bd0", "#d9a441", "#d07ba6", "#58b4d8", "#98a650", "#8291a8", "#b98c63",
  "#6f76dc", "#4fae7c", "#c58ad8"];

export function colourOf(model) {
  if (model < PALETTE.length) return PALETTE[model];
  return `hsl(${Math.round((model * 137.508) % 330 + 25)} 46% 58%)`;
}

export function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ground: of("ground"), line: of("line"), faint: of("faint"), text: of("text"), muted: of("muted"),
    accent: of("accent"), good: of("good"), bad: of("bad"), warn: of("warn"), brush: of("brush") };
}

// An element; text becomes text, never HTML.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, run] of Object.entries(value)) made.addEventListener(event, run);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  for (const child of children) made.append(child instanceof Node ? child : String(child));
  return made;
}

export function count(value) {
  return Math.round(value).toLocaleString("en");
}

export function rate(value) {
  return value >= 100 ? count(value) : value.toFixed(value >= 10 || value === 0 ? 0 : 1);
}

export function lasting(us) {
  const far = Math.abs(us);
  if (far >= 60e6) return `${(us / 60e6).toFixed(1)} min`;
  if (far >= 1e6) return `${(us / 1e6).toFixed(far >= 1e7 ? 1 : 2)} s`;
  if (far >= 1e3) return `${(us / 1e3).toFixed(far >= 1e5 ? 0 : far >= 1e4 ? 1 : 2)} ms`;
  return `${Math.round(us)} µs`;
}

export function signed(us) {
  return `${us < 0 ? "−" : "+"}${lasting(Math.abs(us))}`;
}

export function bytes(value) {
  return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(1)} GiB` : `${(value / 2 ** 20).toFixed(0)} MiB`;
}

// Cut and not rounded: 100 % means all.
export function share(part) {
  return part >= 1 ? "100 %" : `${(Math.floor(part * 10000) / 100).toFixed(2)} %`;
}

export class Clock {
  constructor() { this.beganMs = null; }

  set(started) {
    const at = Date.parse(started);
    this.beganMs = Number.isNaN(at) ? null : at;
  }

  // The time of day of an instant, or how far it is from the journal's beginning; as fine as a step is.
  text(us, stepUs = 1000) {
    const digits = stepUs >= 1e6 ? 0 : stepUs >= 1e3 ? 3 : 6;
    if (this.beganMs === null) {
      const sign = us < 0 ? "−" : "", at = Math.abs(us);
      const minutes = Math.floor(at / 60e6), seconds = (at - minutes * 60e6) / 1e6;
      return `${sign}${minutes}:${seconds.toFixed(digits).padStart(digits ? digits + 3 : 2, "0")}`;
    }
    const at = new Date(this.beganMs + Math.floor(us / 1000));
    const two = (value) => String(value).padStart(2, "0");
    const whole = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
    if (!digits) return whole;
    const rest = String(Math.floor(this.beganMs * 1000 + us) % 1e6).padStart(6, "0");
    return `${whole}.${rest.slice(0, digits)}`;
  }
}

const STEPS = [10, 20, 50, 100, 200, 500].flatMap((one) => [one]);

// Ticks of an axis: a step of 1, 2 or 5 that leaves at least so many pixels between two.
export function tickStep(pixelUs, pixels) {
  const least = pixelUs * pixels;
  for (let power = 1; power < 1e9; power *= 10) {
    for (const one of STEPS.slice(0, 3)) if (one * power / 10 >= least && one * power < 1e7) return one * power / 10;
  }
  for (const seconds of [1, 2, 5, 10, 15, 30, 60, 120, 300, 600]) if (seconds * 1e6 >= least) return seconds * 1e6;
  return 1.8e9;
}
