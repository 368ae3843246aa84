// Charts over time, of bins of counts: requests, latency, queues, memory. Drawn anew only where something changed.

import { gutter } from "./lanes.js";
import { bytes, colourOf, lasting, rate, tickStep } from "./show.js";

const AXIS = 20;
const GAP = 8;

export class Charts {
  constructor(canvas, store, clock) {
    this.canvas = canvas;
    this.store = store;
    this.clock = clock;
    this.context = canvas.getContext("2d", { alpha: false });
    this.kept = document.createElement("canvas"); // what was drawn, for the view as it was then
    this.drawn = null;
    this.colours = {};
    this.brush = null; // {from, to}
    this.hover = null;
  }

  retheme(colours) { this.colours = colours; this.drawn = null; }

  changed() { this.stale = true; }

  resize() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (this.width === width && this.height === height && this.ratio === ratio) return;
    [this.width, this.height, this.ratio] = [width, height, ratio];
    for (const one of [this.canvas, this.kept]) {
      one.width = Math.round(width * ratio);
      one.height = Math.round(height * ratio);
    }
    this.drawn = null;
  }

  draw(view) {
    this.resize();
    const last = this.drawn, moved = last ? Math.abs(view.from - last.from) / view.pixel : Infinity;
    if (!last || this.stale || last.pixel !== view.pixel || moved >= 0.5) {
      this.paint(view);
      this.drawn = { from: view.from, pixel: view.pixel };
      this.stale = false;
    }
    const context = this.context, left = gutter();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(this.kept, 0, 0);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    if (this.brush) {
      const x = Math.max(left, left + (this.brush.from - view.from) / view.pixel);
      const end = Math.min(this.width, left + (this.brush.to - view.from) / view.pixel);
      if (end > x) {
        context.fillStyle = this.colours.brush;
        context.fillRect(x, AXIS, end - x, this.height);
        context.fillStyle = this.colours.accent;
        context.fillRect(x, AXIS, 1, this.height);
        context.fillRect(end - 1, AXIS, 1, this.height);
      }
    }
    if (this.hover !== null && this.hover > left) {
      context.fillStyle = this.colours.muted;
      context.fillRect(this.hover, AXIS, 1, this.height);
    }
  }

  paint(view) {
    const context = this.kept.getContext("2d", { alpha: false }), left = gutter();
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.fillStyle = this.colours.ground;
    context.fillRect(0, 0, this.width, this.height);
    this.axis(context, view, left);
    // One more on each side, for lines lead there.
    const bins = this.store.binsBetween(view.from - this.store.binUs, view.to + this.store.binUs);
    const free = this.height - AXIS - 4, each = (free - 3 * GAP) / 4.6;
    const parts = [["requests", 1.6 * each, this.requests], ["latency", each, this.latency],
      ["waiting", each, this.queues], ["weights", each, this.memory]];
    let y = AXIS;
    for (const [name, height, paint] of parts) {
      context.save();
      context.beginPath();
      context.rect(left, y - 1, this.width - left, height + 2);
      context.clip();
      const most = paint.call(this, context, view, bins, left, y, height);
      context.restore();
      this.label(context, name, most, y, height, left);
      y += height + GAP;
    }
    this.events(context, view, left);
    context.fillStyle = this.colours.line;
    context.fillRect(left - 1, 0, 1, this.height);
  }

  axis(context, view, left) {
    const step = tickStep(view.pixel, 110);
    context.font = "10.5px ui-monospace, Menlo, Consolas, monospace";
    context.textBaseline = "middle";
    // At whole seconds of the day, where that is known; none before the journal's beginning.
    const shift = this.clock.beganMs === null ? 0 : this.clock.beganMs * 1000 % step;
    const first = Math.ceil((Math.max(0, view.from) + shift) / step) * step - shift;
    for (let at = first; at <= view.to; at += step) {
      const x = Math.round(left + (at - view.from) / view.pixel);
      context.fillStyle = this.colours.line;
      context.fillRect(x, AXIS - 4, 1, this.height);
      context.fillStyle = this.colours.muted;
      context.fillText(this.clock.text(at, step), x + 4, 10);
    }
  }

  label(context, name, most, y, height, left) {
    context.textBaseline = "top";
    context.font = "11px ui-sans-serif, system-ui, sans-serif";
    context.fillStyle = this.colours.text;
    context.fillText(name, 12, y);
    if (name === "latency") {
      const under = left < 100 ? 26 : 1, beside = left < 100 ? 12 : left - 52;
      context.font = "10px ui-sans-serif, system-ui, sans-serif";
      context.fillStyle = this.colours.accent;
      context.fillText("p50", beside, y + under);
      context.fillStyle = this.colours.warn;
      context.fillText("p99", beside + 24, y + under);
    }
    context.fillStyle = this.colours.muted;
    context.font = "10px ui-monospace, Menlo, Consolas, monospace";
    if (height > 24) context.fillText(most, 12, y + 14, left - 16);
    context.fillStyle = this.colours.line;
    context.fillRect(left, y + height, this.width, 1);
  }

  // A bar's left edge and width.
  place(bin, view, left) {
    const x = left + (bin.at - view.from) / view.pixel, width = this.store.elapsed(bin) / view.pixel;
    return [x, Math.max(0.6, width > 3 ? width - 1 : width)];
  }

  requests(context, view, bins, left, y, height) {
    const per = 1e6 / this.store.binUs;
    // Of a whole bin: the last one has not ended.
    const whole = (bin, value) => value * bin.lasts / this.store.elapsed(bin);
    const bad = (bin) => whole(bin, Object.values(bin.ends).reduce((sum, one) => sum + one, 0));
    const most = Math.max(1, ...bins.map((bin) => Math.max(whole(bin, bin.arrivals), whole(bin, bin.good) + bad(bin))));
    for (const bin of bins) {
      const [x, width] = this.place(bin, view, left), refused = bad(bin);
      const good = whole(bin, bin.good) / most * height;
      context.fillStyle = this.colours.good;
      context.fillRect(x, y + height - good, width, good);
      if (refused) {
        const tall = Math.max(2, refused / most * height);
        context.fillStyle = this.colours.bad;
        context.fillRect(x, y + height - good - tall, width, tall);
      }
    }
    return `${rate(most * per)}/s`;
  }

  latency(context, view, bins, left, y, height) {
    const most = Math.max(1, ...bins.map((bin) => bin.latency[1] ?? 0));
    for (const [which, colour, thick] of [[1, this.colours.warn, 1], [0, this.colours.accent, 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.beginPath();
      let open = false;
      for (const bin of bins) {
        const value = bin.latency[which];
        if (value === undefined) { open = false; continue; }
        const x = left + (bin.at + bin.lasts / 2 - view.from) / view.pixel, at = y + height - value / most * height;
        if (open) context.lineTo(x, at); else context.moveTo(x, at);
        open = true;
      }
      context.stroke();
    }
    return lasting(most);
  }

  stacks(context, view, bins, left, y, height, of) {
    const most = Math.max(1, ...bins.map((bin) => bin[of].reduce((sum, [, value]) => sum + value, 0)));
    const numbers = new Map(this.store.models.map((name, number) => [name, number]));
    for (const bin of bins) {
      const [x, width] = this.place(bin, view, left);
      let at = y + height;
      for (const [name, value] of bin[of]) {
        const tall = value / most * height;
        context.fillStyle = colourOf(numbers.get(name) ?? 0);
        context.fillRect(x, at - tall, width, tall);
        at -= tall;
      }
    }
    return most;
  }

  queues(...where) { return `${rate(this.stacks(...where, "queues"))}`; }

  memory(...where) { return bytes(this.stacks(...where, "memory")); }

  events(context, view, left) {
    for (const [at, kind] of this.store.events) {
      const x = left + (at - view.from) / view.pixel;
      if (x < left || x > this.width) continue;
      context.fillStyle = kind === "worker" ? this.colours.bad : this.colours.accent;
      context.beginPath();
      context.moveTo(x - 4, AXIS - 7);
      context.lineTo(x + 4, AXIS - 7);
      context.lineTo(x, AXIS);
      context.fill();
    }
  }

  // What a point of the canvas tells.
  at(x, view) {
    const left = gutter(), at = view.from + (x - left) * view.pixel;
    if (x < left) return null;
    const near = this.store.events.filter(([when]) => Math.abs(when - at) < 5 * view.pixel).slice(0, 6);
    const bin = this.store.binsBetween(at, at + 1)[0];
    const lines = near.map(([, kind, text]) => [kind, text]);
    if (bin) {
      const per = 1e6 / this.store.elapsed(bin);
      lines.push(["asked", `${rate(bin.arrivals * per)}/s`], ["good", `${rate(bin.good * per)}/s`]);
      for (const [name, value] of Object.entries(bin.ends)) lines.push([name, `${rate(value * per)}/s`]);
      if (bin.latency.length) lines.push(["p50, p99", `${lasting(bin.latency[0])}, ${lasting(bin.latency[1])}`]);
      for (const [name, value] of bin.queues.slice(0, 3)) if (value) lines.push([`waiting: ${name}`, value]);
    }
    return lines.length ? { title: this.clock.text(at, 1000), lines, bin } : null;
  }
}
