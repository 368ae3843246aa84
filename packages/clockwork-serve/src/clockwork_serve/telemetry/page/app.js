// The live page: follows the stream, keeps the view, and leads from a bar to a request.

import { Charts } from "./charts.js";
import { Lanes, gutter } from "./lanes.js";
import { Panels } from "./panels.js";
import { Clock, count, element, lasting, rate, share, theme } from "./show.js";
import { Store } from "./store.js";

const SPANS = [[1e6, "1 s"], [5e6, "5 s"], [30e6, "30 s"], [120e6, "2 min"], [600e6, "10 min"]];
const DELAY_US = 400e3, DELAY_MOST_US = 4e6;
const AGAIN_MS = 2000;
const SETTLE_MS = 160;
const LEAST_PIXEL = 1, MOST_PIXEL = 2e6;
const at = (id) => document.getElementById(id);

const store = new Store(), clock = new Clock();
const lanes = new Lanes(at("lanes"), at("scroll"), at("height"), store);
const charts = new Charts(at("charts"), store, clock);
const view = { from: 0, to: 30e6, pixel: 25e3, following: true, span: 30e6 };
let stream = null, streamed = 0, heard = { now: 0, at: 0, moving: false }, connected = false;
// The right edge is so far behind: what comes is there before it is seen. As journals are written in pieces, it
// is as long as the longest wait of late.
let delay = DELAY_US, waits = [];
let changedAt = 0, asking = false, wanted = 0;
const panels = new Panels(at("tabs"), at("pane"), { store, clock, stretch, ask, explain });

// ---- time

function plotWidth() { return Math.max(50, at("charts").clientWidth - gutter()); }

// The instant at the right edge: goes on evenly between frames, and stops where they do.
function latest() {
  const since = (performance.now() - heard.at) * 1e3;
  return heard.now - delay + (heard.moving ? Math.min(since, delay) : delay);
}

function hear(now) {
  const at = performance.now(), waited = (at - heard.at) * 1e3;
  if (now > heard.now) {
    if (heard.now && waited < DELAY_MOST_US) waits = [...waits.slice(-19), waited];
    delay = Math.min(DELAY_MOST_US, Math.max(DELAY_US, 1.2 * Math.max(0, ...waits) + 100e3));
    heard = { now, at, moving: true };
  } else if (now < heard.now || waited > delay) heard = { now, at: heard.at, moving: false };
}

let edge = 0;
function placeView() {
  const width = plotWidth();
  view.pixel = Math.min(Math.max(view.span / width, LEAST_PIXEL), MOST_PIXEL);
  view.span = view.pixel * width;
  if (view.following) {
    const ideal = latest();
    // Frames do not come evenly: the edge never goes back, and catches up softly.
    edge = Math.abs(ideal - edge) > 1.5e6 || !heard.moving ? ideal : Math.max(edge, edge + (ideal - edge) * 0.25);
    view.to = edge;
    view.from = view.to - view.span;
  } else view.to = view.from + view.span;
}

function zoom(factor, around = 1) {
  const fixed = view.from + view.span * around;
  view.span = Math.min(Math.max(view.span * factor, 200), 1200e6);
  if (around < 0.98) view.following = false;
  view.from = fixed - view.span * around;
  touched();
}

function pan(us) {
  view.following = false;
  view.from += us;
  if (view.from + view.span > latest()) { view.from = latest() - view.span; }
  touched();
}

function span(us) { view.span = us; if (!view.following) view.from = view.to - us; touched(); }

function pause() {
  view.following = !view.following;
  if (view.following) edge = 0;
  touched();
}

function follow() { view.following = true; edge = 0; charts.brush = null; touched(); panels.refresh(); }

function touched() { changedAt = performance.now(); status(); }

// The stretch that tables are about: what is brushed, else what is seen.
function stretch() { return charts.brush ? [charts.brush.from, charts.brush.to] : [view.from, view.to]; }

// ---- data

async function ask(path) {
  try {
    const response = await fetch(`/live/${path}`, { credentials: "same-origin" });
    if (response.status === 401 || response.status === 403) denied = true;
    if (!response.ok) return null;
    return await response.json();
  } catch { return null; }
}

let denied = false;

// Boxes as fine as the screen shows them, for more than is seen, so that moving needs nothing.
async function fetchWindow() {
  if (asking) return;
  asking = true;
  const margin = view.following ? 0.1 : 0.6;
  const from = Math.floor(view.from - view.span * margin);
  const to = Math.ceil(view.to + (view.following ? 10e6 : view.span * margin + delay));
  const pixels = Math.max(1, Math.min(10000, Math.round((to - from) / view.pixel)));
  const known = store.known, pixel = view.pixel, generation = store.generation;
  const found = await ask(`window?from=${from}&to=${to}&pixels=${pixels}&models=${known.models}&lanes=${known.lanes}`);
  asking = false;
  if (!found || generation !== store.generation) return;
  const before = store.covered;
  store.window(found, pixel);
  lanes.reload(before);
  charts.changed();
  figures();
}

function needsWindow() {
  const covered = store.covered, now = performance.now();
  if (now < wanted) return false;
  const far = !covered || view.from < covered.from - view.pixel && covered.from > store.kept
    || Math.min(view.to, store.now) > covered.to + 2e6;
  const coarse = covered && (view.pixel > covered.pixel * 1.6 || view.pixel < covered.pixel / 1.6);
  if (!far && !(coarse && now - changedAt > SETTLE_MS)) return false;
  wanted = now + 250;
  return true;
}

function openStream(begun = () => { store.clear(); lanes.flush(); }) {
  if (stream) stream.close();
  streamed = Math.max(1, Math.round(view.pixel));
  stream = new EventSource(`/live/stream?pixel=${streamed}`);
  let first = true;
  stream.onopen = () => {
    connected = true;
    // A connection that was made anew may lead to another server, with other numbers for names.
    if (first) begun(); else { store.clear(); lanes.flush(); }
    first = false;
    status();
  };
  const own = stream;
  stream.onerror = () => {
    connected = false;
    status();
    // One that was refused is not tried again by the browser.
    if (own.readyState === EventSource.CLOSED) setTimeout(() => { if (stream === own) openStream(); }, AGAIN_MS);
  };
  stream.onmessage = (event) => {
    const found = JSON.parse(event.data);
    hear(found.now);
    if (found.gap) store.covered = null;
    const rows = store.frame(found, view.following || found.now - view.to < 2 * view.span + 5e6);
    lanes.layOut();
    lanes.add(rows);
    charts.changed();
    if (!connected) { connected = true; status(); }
  };
}

// ---- what is said

function status() {
  const [text, kind] = !connected ? [denied ? "no access" : "not connected", "lost"] : !view.following ? ["paused", "paused"]
    : heard.moving ? ["live", "live"] : ["nothing new", ""];
  const state = at("state");
  if (state.textContent !== text) { state.textContent = text; state.className = `state ${kind}`; }
  at("pause").textContent = view.following ? "Pause" : "Follow";
  for (const button of at("spans").children) {
    button.setAttribute("aria-pressed", Math.abs(view.span / Number(button.dataset.us) - 1) < 0.02);
  }
}

function figures() {
  const [from, to] = stretch(), bins = store.binsBetween(from, to);
  let asked = 0, good = 0, bad = 0, p99 = 0, us = 0;
  for (const bin of bins) {
    asked += bin.arrivals; good += bin.good; us += Math.min(bin.lasts, store.now - bin.at);
    for (const one of Object.values(bin.ends)) bad += one;
    p99 = Math.max(p99, bin.latency[1] ?? 0);
  }
  const seconds = Math.max(us / 1e6, 1e-3), last = bins[bins.length - 1];
  const waiting = last ? last.queues.reduce((sum, [, value]) => sum + value, 0) : 0;
  const rows = [["goodput", `${rate(good / seconds)}/s`], ["asked", `${rate(asked / seconds)}/s`],
    ["satisfaction", good + bad ? share(good / (good + bad)) : "–"], ["not good", count(bad), bad > 0], ["p99 at worst", p99 ? lasting(p99) : "–"],
    ["waiting at the end", count(waiting)]];
  const parent = at("figures");
  if (parent.children.length !== rows.length) {
    parent.replaceChildren(...rows.map(([name]) => element("div", { class: "figure" }, element("b"), element("span", {}, name))));
  }
  rows.forEach(([, value, isBad], number) => {
    parent.children[number].firstChild.textContent = value;
    parent.children[number].className = isBad ? "figure bad" : "figure";
  });
  at("clock").textContent = clock.text(view.to);
}

async function explain(row) {
  const [ended, arrived, request, model, , outcome, reason, slo, , , , device, cold, promised, message] = row;
  const body = at("answer-body");
  const line = (name, value) => [element("dt", {}, name), element("dd", {}, value)];
  const told = element("p", { class: "sentence" }, sentence(row));
  body.replaceChildren(element("h2", {}, request), told, element("dl", {}, ...line("model", model),
    ...line("outcome", reason ? `${outcome}: ${reason}` : outcome), ...line("came", clock.text(arrived)),
    ...line("ended", `${clock.text(ended)}, after ${lasting(ended - arrived)} of ${lasting(slo)}`),
    ...(device ? line("device", `${device}${cold ? ", weights were loaded for it" : ""}`) : []),
    ...(promised ? line("promised", "yes") : []), ...(message ? line("the server said", message) : [])));
  const more = element("p", { class: "muted" }, "looking for the reasons …");
  body.append(more);
  if (!at("answer").open) at("answer").showModal();
  const response = await fetch(`/live/explain?id=${encodeURIComponent(request)}`).catch(() => null);
  const found = response && await response.json().catch(() => null);
  if (!response?.ok || !found?.sentence) { more.textContent = found?.error ?? "the server did not answer"; return; }
  told.textContent = found.sentence;
  more.replaceWith(...(found.lines ?? []).slice(1).map((one) => element("p", {}, one)));
}

function sentence([ended, arrived, , , , outcome, reason, slo, queue, ran, batch, device]) {
  const after = lasting(ended - arrived), limit = lasting(slo);
  if (outcome === "ok") return `Answered after ${after} of ${limit}: it waited ${lasting(queue)} and ran ${lasting(ran)} in a batch of ${batch} on ${device}.`;
  const why = { would_miss_deadline: "no schedule could meet its deadline any more", queue_full: "the queue was full",
    tenant_quota: "its tenant had used up its quota", late: "its result came after the deadline" }[reason]
    ?? (reason || "it had no answer in time").replaceAll("_", " ");
  const verb = { rejected: "Refused", expired: "Expired", cancelled: "Cancelled", failed: "Failed" }[outcome] ?? outcome;
  return `${verb} ${after} after it came, with ${limit} to be answered in: ${why}.`;
}

// ---- hands

function tip(found, event, owner) {
  const box = at("tip");
  if (!found) { box.hidden = true; return; }
  box.replaceChildren(element("b", { class: found.bad ? "bad" : "" }, found.title),
    ...found.lines.map(([name, value]) => element("div", {}, element("span", {}, name), element("span", {}, value))));
  box.hidden = false;
  const area = at("plots").getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
  box.style.left = `${Math.min(x + 14, area.width - box.offsetWidth - 6)}px`;
  box.style.top = `${Math.min(y + 14, Math.max(0, area.height - box.offsetHeight - 6))}px`;
}

function select(from, to) {
  charts.brush = { from, to };
  view.following = false;
  panels.only = store.binsBetween(from, to).some((bin) => Object.keys(bin.ends).length) ? "bad" : "";
  panels.show("requests");
  touched();
  figures();
}

function hands(canvas, brushes) {
  let down = null;
  const instant = (x) => view.from + (x - gutter()) * view.pixel;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.offsetX < gutter() || event.button) return;
    canvas.setPointerCapture(event.pointerId);
    const brush = (brushes && event.pointerType !== "touch") || event.shiftKey;
    down = { x: event.offsetX, from: view.from, at: instant(event.offsetX), brush, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    charts.hover = event.offsetX;
    if (!down) {
      const found = canvas.id === "charts" ? charts.at(event.offsetX, view) : lanes.at(event.offsetX, event.offsetY, view);
      tip(found, event, canvas);
      return;
    }
    if (Math.abs(event.offsetX - down.x) > 3) down.moved = true;
    if (!down.moved) return;
    tip(null);
    if (down.brush) {
      const other = instant(event.offsetX);
      charts.brush = { from: Math.min(down.at, other), to: Math.max(down.at, other) };
    } else {
      view.following = false;
      view.from = Math.min(down.from - (event.offsetX - down.x) * view.pixel, latest() - view.span * 0.5);
      touched();
    }
  });
  const up = (event) => {
    const was = down;
    down = null;
    if (!was) return;
    if (was.moved) { if (was.brush && charts.brush) select(charts.brush.from, charts.brush.to); return; }
    const found = canvas.id === "charts" ? charts.at(event.offsetX, view) : lanes.at(event.offsetX, event.offsetY, view);
    if (canvas.id === "charts" && found && found.bin) select(found.bin.at, found.bin.at + found.bin.lasts - 1);
    else if (found && found.box) {
      const [start, lasted] = found.box;
      const ends = start + (found.row.refused ? 0 : lasted), slack = Math.max(2 * view.pixel, 2e3);
      select(start - (found.row.refused ? slack : 0), ends + slack);
    }
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", () => { down = null; });
  canvas.addEventListener("pointerleave", () => { charts.hover = null; tip(null); });
  canvas.addEventListener("wheel", (event) => {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (sideways) { event.preventDefault(); pan(event.deltaX * view.pixel); }
    else if (event.ctrlKey || event.metaKey || brushes) {
      event.preventDefault();
      zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004), view.following ? 1 : (event.offsetX - gutter()) / plotWidth());
    }
  }, { passive: false });
}

const KEYS = [["Space", "pause, or follow"], ["← →", "earlier, later"], ["+ −", "zoom"], ["End", "the latest"],
  ["R", "requests of the stretch"], ["1 … 6", "tables"], ["T", "light or dark"], ["Esc", "nothing is selected"],
  ["a tab again", "folds the tables, for more lanes"], ["drag", "on charts: select a stretch; on lanes: move"], ["click", "a bar or a box: its requests; a request: why"],
  ["wheel", "on charts, or with Ctrl on lanes: zoom"]];

function help() {
  at("keys-body").replaceChildren(element("h2", {}, "Keys"), element("dl", {}, ...KEYS.flatMap(([key, text]) => [
    element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)])));
  at("keys").showModal();
}

function retheme() {
  const colours = theme();
  lanes.retheme(colours);
  charts.retheme(colours);
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  retheme();
}

function keyboard(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const run = {
    " ": pause, ArrowLeft: () => pan(-view.span / 10), ArrowRight: () => pan(view.span / 10), "+": () => zoom(0.7), "=": () => zoom(0.7),
    "-": () => zoom(1 / 0.7), End: follow, r: () => panels.show("requests"), t: toggleTheme, "?": help,
    Escape: () => { charts.brush = null; panels.refresh(); figures(); },
  }[event.key];
  if (/^[1-6]$/.test(event.key)) panels.number(Number(event.key) - 1);
  else if (!run || (event.key === " " && event.target.tagName === "BUTTON")) return;
  else run();
  event.preventDefault();
}

// ---- frames

function tick() {
  placeView();
  const settled = performance.now() - changedAt > SETTLE_MS;
  if (connected && needsWindow()) fetchWindow();
  charts.draw(view);
  lanes.draw(view, settled);
  requestAnimationFrame(tick);
}

function everySecond() {
  status();
  figures();
  if (view.following) store.trim(view.from - view.span);
  const ratio = view.pixel / streamed;
  if (view.following && (ratio > 1.6 || ratio < 0.6)) reopen();
}

// The stream is as fine as the screen shows it; what is here stays.
function reopen() {
  openStream(() => { store.covered = null; });
}

function begin() {
  for (const [us, text] of SPANS) at("spans").append(element("button", { "data-us": us, on: { click: () => span(us) } }, text));
  at("pause").addEventListener("click", pause);
  at("latest").addEventListener("click", follow);
  at("in").addEventListener("click", () => zoom(0.6));
  at("out").addEventListener("click", () => zoom(1 / 0.6));
  at("theme").addEventListener("click", toggleTheme);
  at("help").addEventListener("click", help);
  document.addEventListener("keydown", keyboard);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
  hands(at("charts"), true);
  hands(at("lanes"), false);
  retheme();
  placeView();
  openStream();
  setInterval(everySecond, 1000);
  setInterval(() => { if (panels.tab !== "requests" && (view.following || panels.tab === "settings")) panels.refresh(); }, 3000);
  setTimeout(() => panels.refresh(), 600);
  requestAnimationFrame(tick);
}

begin();

// For who drives the page: tests, and the console.
globalThis.livePage = { store, view, charts, lanes, select, span, zoom };
