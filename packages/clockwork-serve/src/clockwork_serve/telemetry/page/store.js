// What the page knows: boxes of each lane, bins of counts, events, names. Bounded: what is far from view is dropped.

export const EVENTS_MOST = 1000;

export class Store {
  constructor() { this.clear(); }

  clear() {
    this.generation = (this.generation ?? 0) + 1; // answers to what was asked before are of no use
    this.now = 0;
    this.kept = 0;
    this.models = [];
    this.lanes = []; // {name, kind, boxes}
    this.open = [];
    this.bins = new Map(); // by start
    this.binUs = 1e6;
    this.events = [];
    this.covered = null; // {from, to, pixel}: of which boxes are here
    this.recent = []; // frames that may be newer than a window that is on its way
    this.version = 0; // of names and lanes
  }

  get known() { return { models: this.models.length, lanes: this.lanes.length }; }

  names(found) {
    const [from, models] = found.models, [start, lanes] = found.names;
    models.forEach((name, at) => { this.models[from + at] = name; });
    lanes.forEach(([name, kind], at) => {
      if (!this.lanes[start + at]) { this.lanes[start + at] = { name, kind, boxes: [], longest: 0 }; this.version += 1; }
    });
  }

  // A frame of the stream; the rows that are new, by lane. Boxes far from what is seen are not kept.
  frame(found, near) {
    this.names(found);
    this.now = Math.max(this.now, found.now);
    this.open = found.open;
    this.addBins(found.bins);
    this.addEvents(found.events);
    if (!near) {
      if (this.covered) this.covered.open = false;
      this.recent = [];
      return [];
    }
    this.addBoxes(found.lanes);
    this.recent.push(found);
    if (this.recent.length > 30) this.recent.shift();
    if (this.covered && this.covered.open) this.covered.to = Math.max(this.covered.to, found.now);
    return found.lanes;
  }

  addBoxes(lanes) {
    for (const [lane, rows] of lanes) {
      const of = this.lanes[lane];
      for (const row of rows) {
        of.boxes.push(row);
        if (of.kind !== "refused" && row[1] > of.longest) of.longest = row[1];
      }
    }
  }

  addBins(bins) {
    for (const bin of bins) { this.bins.set(bin.at, bin); this.binUs = bin.lasts; }
    if (this.bins.size > 1300) {
      const starts = [...this.bins.keys()].sort((a, b) => a - b);
      for (const start of starts.slice(0, this.bins.size - 1200)) this.bins.delete(start);
    }
  }

  addEvents(events) {
    if (!events.length) return;
    const known = new Set(this.events.map(([at, , text]) => `${at} ${text}`));
    for (const one of events) if (!known.has(`${one[0]} ${one[2]}`)) this.events.push(one);
    this.events.sort((a, b) => a[0] - b[0]);
    if (this.events.length > EVENTS_MOST) this.events.splice(0, this.events.length - EVENTS_MOST);
  }

  // All that is known of a stretch: replaces the boxes that are here.
  window(found, pixel) {
    this.names(found);
    this.kept = found.kept;
    this.now = Math.max(this.now, found.now);
    for (const lane of this.lanes) lane.boxes = [];
    this.addBoxes(found.lanes);
    this.addBins(found.bins);
    this.addEvents(found.events);
    // One that reached its now goes on with the stream; an earlier one ends where it ends.
    const open = found.to >= found.now;
    this.covered = { from: found.from, to: open ? found.now : found.to, pixel, open };
    if (open) {
      for (const frame of this.recent) {
        if (frame.now > found.now) { this.addBoxes(frame.lanes); this.covered.to = Math.max(this.covered.to, frame.now); }
      }
    }
  }

  // Drop boxes that ended long before what is seen.
  trim(before) {
    if (!this.covered || this.covered.from >= before) return;
    for (const lane of this.lanes) {
      const boxes = lane.boxes;
      let keep = 0;
      while (keep < boxes.length && boxes[keep][0] + (lane.kind === "refused" ? 0 : boxes[keep][1]) < before) keep += 1;
      if (keep) lane.boxes = boxes.slice(keep);
    }
    this.covered.from = before;
  }

  binsBetween(from, to) {
    const found = [];
    for (const bin of this.bins.values()) if (bin.at + bin.lasts > from && bin.at < to) found.push(bin);
    return found.sort((a, b) => a.at - b.at);
  }

  // How much of a bin has passed.
  elapsed(bin) {
    return Math.min(bin.lasts, Math.max(this.now - bin.at, bin.lasts / 10));
  }
}

// The first of sorted boxes that begins at or after an instant.
export function firstFrom(boxes, at) {
  let low = 0, high = boxes.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (boxes[middle][0] < at) low = middle + 1; else high = middle;
  }
  return low;
}
