// Lanes of devices on a canvas. What is over is drawn once, into tiles of 256 pixels; a frame copies tiles.

import { colourOf, lasting, signed } from "./show.js";
import { firstFrom } from "./store.js";

const TILE = 256;
const GUTTER = 132;
const TILES_MOST = 40;
const BUDGET_MS = 5; // of a frame, for tiles
const STATUS = ["ok", "too early", "too late", "unknown code", "unknown device", "weights missing", "weights changed",
  "no room", "in use", "bad action", "input gone", "model raised", "device fault", "damaged", "shutting down"];

export const gutter = () => (window.innerWidth <= 700 ? 76 : GUTTER);

export class Lanes {
  constructor(canvas, scroll, spacer, store) {
    this.canvas = canvas;
    this.scroll = scroll;
    this.spacer = spacer;
    this.store = store;
    this.context = canvas.getContext("2d", { alpha: false });
    this.tiles = new Map(); // by number, {canvas, context, done: lanes that are drawn}
    this.pixel = 0; // microseconds of a pixel of the tiles
    this.rows = []; // {lane, y, h}
    this.rowOf = new Map(); // by lane, its row
    this.laidOut = -1;
    this.bandsH = 0;
    this.colours = {};
  }

  retheme(colours) {
    this.colours = colours;
    this.flush();
  }

  flush() { this.tiles.clear(); }

  // Boxes were loaded: tiles of what was known before are as good as they were.
  reload(before) {
    const tileUs = TILE * this.pixel;
    for (const number of this.tiles.keys()) {
      const from = number * tileUs;
      if (!before || from < before.from || from + tileUs > before.to || before.pixel !== this.store.covered.pixel) {
        this.tiles.delete(number);
      }
    }
  }

  // Rows: refusals by reason first, then each device with its two lanes.
  layOut() {
    if (this.laidOut === this.store.version) return;
    this.laidOut = this.store.version;
    const devices = new Map();
    const reasons = [];
    this.store.lanes.forEach((lane, number) => {
      if (lane.kind === "refused") reasons.push(number);
      else {
        if (!devices.has(lane.name)) devices.set(lane.name, {});
        devices.get(lane.name)[lane.kind] = number;
      }
    });
    const dense = devices.size > 20;
    const [execH, loadH, gap] = dense ? [9, 3, 3] : [17, 5, 6];
    this.rows = [];
    let y = 4;
    for (const lane of reasons) {
      this.rows.push({ lane, y, h: 9, label: this.store.lanes[lane].name, refused: true });
      y += 13;
    }
    if (reasons.length) y += 5;
    for (const [name, lanes] of devices) {
      if (lanes.exec !== undefined) this.rows.push({ lane: lanes.exec, y, h: execH, label: name });
      if (lanes.load !== undefined) this.rows.push({ lane: lanes.load, y: y + execH + 1, h: loadH, load: true });
      y += execH + 1 + loadH + gap;
    }
    this.contentH = y + 4;
    this.rowOf = new Map(this.rows.map((row) => [row.lane, row]));
    this.spacer.style.height = `${this.contentH}px`;
    this.flush();
  }

  resize() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = this.scroll.clientWidth, height = Math.max(40, this.scroll.clientHeight);
    if (this.width === width && this.height === height && this.ratio === ratio) return;
    [this.width, this.height, this.ratio] = [width, height, ratio];
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    this.flush();
  }

  // New rows go into the tiles that are there.
  add(lanes) {
    if (!this.pixel) return;
    for (const [lane, rows] of lanes) {
      const row = this.rowOf.get(lane);
      if (!row) continue;
      for (const box of rows) {
        const [from, to] = reach(box);
        const first = Math.floor(from / this.pixel / TILE), last = Math.floor((to / this.pixel + 1) / TILE);
        for (let number = first; number <= last && number < first + 50; number += 1) {
          const tile = this.tiles.get(number);
          if (tile && tile.done >= this.rows.length) this.box(tile.context, box, row, number * TILE * this.pixel);
        }
      }
    }
  }

  draw(view, settled) {
    this.resize();
    this.layOut();
    const context = this.context, ratio = this.ratio, left = gutter();
    const pixel = view.pixel;
    if (settled && this.pixel !== pixel) { this.pixel = pixel; this.flush(); }
    if (!this.pixel) this.pixel = pixel;
    const top = this.scroll.scrollTop, shown = Math.min(this.height, this.contentH - top);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = this.colours.ground;
    context.fillRect(0, 0, this.width, this.height);
    const scale = this.pixel / pixel, tileUs = TILE * this.pixel;
    const first = Math.floor(view.from / tileUs), last = Math.floor(view.to / tileUs);
    const until = performance.now() + BUDGET_MS;
    context.save();
    context.beginPath();
    context.rect(left, 0, this.width - left, this.height);
    context.clip();
    for (let number = last; number >= first && last - first < 200; number -= 1) {
      const tile = this.tile(number, until);
      if (!tile.done || shown <= 0) continue;
      const exact = left + (number * tileUs - view.from) / pixel;
      const x = scale === 1 ? Math.round(exact * ratio) / ratio : exact;
      context.drawImage(tile.canvas, 0, Math.round(top * ratio), TILE * ratio, shown * ratio, x, 0, TILE * scale, shown);
    }
    this.drawOpen(context, view, top);
    context.restore();
    this.labels(context, top);
  }

  tile(number, until) {
    let tile = this.tiles.get(number);
    if (!tile) {
      if (this.tiles.size >= TILES_MOST) this.tiles.delete(this.tiles.keys().next().value);
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(TILE * this.ratio);
      canvas.height = Math.max(1, Math.round(this.contentH * this.ratio));
      const context = canvas.getContext("2d");
      context.scale(this.ratio, this.ratio);
      tile = { canvas, context, done: 0 };
      this.tiles.set(number, tile);
    }
    const from = number * TILE * this.pixel, to = from + TILE * this.pixel;
    while (tile.done < this.rows.length && performance.now() < until) {
      const row = this.rows[tile.done];
      tile.done += 1;
      this.lane(tile.context, row, from, to);
    }
    return tile;
  }

  // One lane of a tile.
  lane(context, row, from, to) {
    const { boxes, longest } = this.store.lanes[row.lane];
    context.fillStyle = this.colours.faint;
    context.fillRect(0, row.y, TILE, row.h);
    const slack = longest + 2e6;
    for (let at = firstFrom(boxes, from - slack); at < boxes.length; at += 1) {
      const box = boxes[at];
      if (box[0] > to + 2e6) break;
      const [begins, ends] = reach(box);
      if (begins <= to && ends >= from - this.pixel) this.box(context, box, row, from);
    }
  }

  box(context, box, row, from) {
    const pixel = this.pixel, x = (box[0] - from) / pixel;
    if (row.refused) {
      const size = Math.min(row.h, 2.5 + 1.5 * Math.log2(1 + box[1]));
      context.fillStyle = this.colours.bad;
      context.beginPath();
      context.arc(x, row.y + row.h / 2, size / 2, 0, 7);
      context.fill();
      return;
    }
    if (box.length < 10) {
      const width = Math.max(1, box[1] / pixel), busy = Math.min(1, box[5] / Math.max(box[1], pixel, 1));
      const height = Math.max(1, row.h * busy);
      context.fillStyle = box[3] ? this.colours.bad : colourOf(box[2]);
      context.fillRect(x, row.y + row.h - height, width, height);
      return;
    }
    const [, lasted, ahead, expected, due, , model, batch, , status] = box;
    const width = Math.max(1, lasted / pixel), colour = colourOf(model);
    context.fillStyle = status ? this.colours.bad : colour;
    context.globalAlpha = row.load ? 0.75 : 1;
    context.fillRect(x, row.y, Math.max(0.5, width - (width > 4 ? 0.5 : 0)), row.h);
    context.globalAlpha = 1;
    if (row.h < 6) return;
    if (expected / pixel >= 3) {
      context.strokeStyle = this.colours.text;
      context.globalAlpha = 0.45;
      context.lineWidth = 1;
      context.strokeRect(x + ahead / pixel + 0.5, row.y + 0.5, expected / pixel - 1, row.h - 1);
      context.globalAlpha = 1;
    }
    if (width >= 4 && row.label) {
      context.fillStyle = due < lasted ? this.colours.bad : this.colours.muted;
      context.fillRect(x + due / pixel, row.y - 2, 1, 5);
    }
    if (width >= 46 && row.h >= 14) this.caption(context, x, width, row, `${this.store.models[model] ?? ""} ×${batch}`);
  }

  caption(context, x, width, row, text) {
    context.save();
    context.beginPath();
    context.rect(x, row.y, width - 3, row.h);
    context.clip();
    context.fillStyle = "rgba(10, 12, 16, .82)";
    context.font = "10.5px ui-sans-serif, system-ui, sans-serif";
    context.textBaseline = "middle";
    context.fillText(text, x + 4, row.y + row.h / 2 + 0.5);
    context.restore();
  }

  // What was sent and has not ended: outlines, as predicted.
  drawOpen(context, view, top) {
    context.lineWidth = 1;
    context.setLineDash([3, 2]);
    for (const [lane, start, lasts, model] of this.store.open) {
      const row = this.rowOf.get(lane);
      if (!row || row.y + row.h < top || row.y > top + this.height) continue;
      const x = gutter() + (start - view.from) / view.pixel, width = Math.max(2, lasts / view.pixel);
      if (x > this.width || x + width < 0) continue;
      context.strokeStyle = colourOf(model);
      context.strokeRect(x + 0.5, row.y - top + 0.5, width - 1, row.h - 1);
    }
    context.setLineDash([]);
  }

  labels(context, top) {
    const left = gutter();
    context.font = "11px ui-sans-serif, system-ui, sans-serif";
    context.textBaseline = "middle";
    for (const row of this.rows) {
      const y = row.y - top;
      if (!row.label || y + row.h < -8 || y > this.height) continue;
      context.fillStyle = row.refused ? this.colours.bad : this.colours.muted;
      const text = row.refused ? row.label.replace(/^rejected: /, "") : row.label;
      context.fillText(fitting(context, text, left - 18), 12, y + row.h / 2 + 0.5, left - 18);
    }
    context.fillStyle = this.colours.line;
    context.fillRect(left - 1, 0, 1, this.height);
  }

  // What lies below a point of the canvas: lines of a name and a value.
  at(x, y, view) {
    const under = y + this.scroll.scrollTop;
    const row = this.rows.find((one) => under >= one.y - 2 && under <= one.y + one.h + 1);
    if (!row || x < gutter()) return null;
    const at = view.from + (x - gutter()) * view.pixel, near = 3 * view.pixel;
    const lane = this.store.lanes[row.lane];
    let best = null, distance = Infinity;
    for (let index = firstFrom(lane.boxes, at - lane.longest - 2e6); index < lane.boxes.length; index += 1) {
      const box = lane.boxes[index];
      if (box[0] > at + near) { if (box[0] > at + 2e6) break; continue; }
      const ends = box[0] + (row.refused ? 0 : box[1]);
      const away = at < box[0] ? box[0] - at : at > ends ? at - ends : 0;
      if (away <= near && away < distance) { best = box; distance = away; }
    }
    return best && { lane, row, box: best, ...this.told(best, row, lane) };
  }

  told(box, row, lane) {
    const models = this.store.models;
    if (row.refused) return { title: lane.name, lines: [["requests", box[1]], ["model", models[box[2]] || "not known"]] };
    const what = lane.kind === "load" ? "LOAD " : "";
    if (box.length < 10) {
      return { title: `${what}${models[box[2]]}${box[4] > 1 ? ` and others` : ""}`, lines: [["actions", box[4]],
        ["busy", `${lasting(box[5])} of ${lasting(box[1])}`], ...(box[3] ? [["not all ended well", ""]] : [])] };
    }
    const [, lasted, ahead, expected, due, , model, batch, requests, status] = box;
    const lines = [["took", lasting(lasted)], ["predicted", `${lasting(expected)}`], ["off by", signed(lasted - expected)],
      ["started", `${signed(-ahead)} from the plan`]];
    if (lane.kind === "exec") {
      lines.unshift(["batch", `${batch}, ${requests} request${requests === 1 ? "" : "s"}`]);
      lines.push(["first deadline", `${signed(due - lasted)} after its end`]);
    }
    if (status) lines.unshift(["ended", status === 255 ? "without a result" : STATUS[status] ?? status]);
    return { title: `${what}${models[model]}`, lines, bad: status > 0 };
  }
}

// From when to when a row is to be seen, its prediction and deadline included.
function reach(box) {
  if (box.length < 10) return [box[0] - 1e4, box[0] + (box.length === 3 ? 1e4 : box[1])];
  const [start, lasted, ahead, expected, due] = box;
  return [start + Math.min(0, ahead), start + Math.max(lasted, ahead + expected, due)];
}

function fitting(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let kept = text;
  while (kept.length > 3 && context.measureText(`${kept}…`).width > width) kept = kept.slice(0, -2);
  return `${kept}…`;
}
