// Tables below the lanes: requests of a stretch, models, tenants, devices, settings, events.

import { bytes, colourOf, count, element, lasting, rate, share } from "./show.js";

const PAGE = 100;
const TABS = [["requests", "Requests"], ["models", "Models"], ["tenants", "Tenants"], ["devices", "Devices"],
  ["events", "Events"], ["settings", "Settings"]];

export class Panels {
  constructor(tabs, pane, page) {
    this.pane = pane;
    this.page = page; // {store, clock, stretch(), ask(path), explain(row)}
    this.tab = "models";
    this.only = "bad";
    this.offset = 0;
    this.asked = 0;
    this.buttons = TABS.map(([name, title], at) => element("button", {
      role: "tab", "aria-selected": String(name === this.tab), title: `${title} (${at + 1})`, on: { click: () => this.choose(name) },
    }, title));
    tabs.append(...this.buttons);
    tabs.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (TABS.findIndex(([name]) => name === this.tab) + step + TABS.length) % TABS.length;
      this.show(TABS[next][0]);
      this.buttons[next].focus();
      event.stopPropagation();
    });
  }

  number(at) { if (TABS[at]) this.choose(TABS[at][0]); }

  // The one that is shown already is folded away, for more lanes.
  choose(name) {
    const folded = this.tab === name && !document.body.classList.contains("folded");
    document.body.classList.toggle("folded", folded);
    if (!folded) this.show(name);
  }

  show(name) {
    document.body.classList.remove("folded");
    this.tab = name;
    this.offset = 0;
    TABS.forEach(([one], at) => this.buttons[at].setAttribute("aria-selected", one === name));
    this.refresh();
  }

  // Ask anew; an answer that comes after another question is dropped.
  async refresh() {
    const asked = this.asked += 1, tab = this.tab;
    const [from, to] = this.page.stretch().map(Math.round);
    const only = this.only ? `&only=${this.only}` : "";
    const path = tab === "requests" ? `requests?from=${from}&to=${to}&offset=${this.offset}&limit=${PAGE}${only}`
      : `panels?from=${from}&to=${to}`;
    const found = tab === "events" ? {} : await this.page.ask(path);
    if (asked !== this.asked || !found) return;
    if (found.started !== undefined) this.page.clock.set(found.started);
    const drawn = tab === "events" ? this.events(from, to) : this[tab](found);
    const focus = this.pane.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
    const top = this.pane.scrollTop;
    this.pane.replaceChildren(...drawn);
    this.pane.scrollTop = top;
    if (focus) for (const row of this.pane.querySelectorAll("tr.open")) if (row.dataset.id === focus) row.focus();
  }

  table(heads, rows) {
    const head = element("tr", {}, ...heads.map((name) => element("th", name.startsWith(">") ? { class: "n" } : {},
      name.replace(">", ""))));
    return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  }

  row(cells, attributes = {}) {
    return element("tr", attributes, ...cells.map((cell) => {
      if (cell instanceof Node) return cell;
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      return element("td", { class: kind, title: kind.includes("name") ? text : null }, text);
    }));
  }

  named(name) {
    const number = this.page.store.models.indexOf(name);
    const swatch = element("span", { class: "swatch" });
    if (number >= 0) swatch.style.background = colourOf(number);
    return element("td", { class: "name", title: name }, swatch, name);
  }

  requests(found) {
    const { rows, total, since } = found, clock = this.page.clock;
    const [from, to] = this.page.stretch();
    const choose = [["bad", "Refused and failed"], ["good", "Good"], ["", "All"]].map(([only, title]) => element(
      "button", { "aria-pressed": String(only === this.only), on: { click: () => { this.only = only; this.offset = 0; this.refresh(); } } },
      title,
    ));
    const turn = (step, title, off) => element("button", { disabled: off, on: { click: () => {
      this.offset = Math.max(0, this.offset + step); this.refresh();
    } } }, title);
    const last = Math.min(total, this.offset + rows.length);
    const bar = element("div", { class: "bar" }, element("span", { class: "group" }, ...choose),
      element("span", {}, `${clock.text(from)} to ${clock.text(to)}: ${count(total)}`),
      turn(-PAGE, "Earlier", this.offset === 0), element("span", {}, total ? `${this.offset + 1} to ${last}` : "none"),
      turn(PAGE, "Later", last >= total),
      since > from ? element("span", {}, `not all from before ${clock.text(since)} are listed`) : "");
    const body = rows.map((one) => {
      const [ended, arrived, request, model, tenant, outcome, reason, slo, queue, ran, batch, device] = one;
      const open = () => this.page.explain(one);
      const good = outcome === "ok";
      return this.row([
        [clock.text(ended), "m"], [request, "m name"], this.named(model), [reason ? `${outcome}: ${reason}` : outcome,
          good ? "good" : "bad"], [lasting(ended - arrived), "n"], [lasting(slo), "n"], [good ? lasting(queue) : "", "n"],
        [good ? lasting(ran) : "", "n"], [batch || "", "n"], [device, "name"], [tenant, "name"],
      ], { class: "open", tabindex: 0, "data-id": request, on: { click: open, keydown: (event) => {
        if (event.key === "Enter") open();
      } } });
    });
    return [bar, this.table(["ended", "request", "model", "outcome", ">after", ">SLO", ">waited", ">ran", ">batch", "device",
      "tenant"], body)];
  }

  counts(found, rows, heads, more = () => []) {
    const seconds = Math.max(found.seconds, 1e-6);
    return [this.table(heads, rows.map((one) => {
      const [name, asked, good, bad] = one, ended = good + bad;
      return this.row([this.named(name), [rate(asked / seconds), "n"], [rate(good / seconds), "n"],
        [rate(bad / seconds), bad ? "n bad" : "n"], [ended ? share(good / ended) : "", "n"], ...more(one)]);
    }))];
  }

  models(found) {
    return this.counts(found, found.models, ["model", ">asked/s", ">good/s", ">not good/s", ">satisfaction", ">waiting",
      ">devices that have it"], (one) => [[count(one[4]), "n"], [count(one[5]), "n"]]);
  }

  tenants(found) {
    if (!found.tenants.length) return [element("div", { class: "bar" }, "No request of this stretch names a tenant.")];
    return this.counts(found, found.tenants, ["tenant", ">asked/s", ">good/s", ">not good/s", ">satisfaction"]);
  }

  devices(found) {
    const meter = (part) => {
      const fill = element("i"), cell = element("td", { class: "n" }, `${(100 * part).toFixed(0)} %`, element("span", { class: "meter" }, fill));
      fill.style.width = `${Math.min(100, 100 * part)}%`;
      return cell;
    };
    return [this.table(["device", "kind", "worker", "state", ">executing", ">loading", ">weights", ">of", ">models"],
      found.devices.map((one) => this.row([
        [one.device, "name"], [one.kind, "name"], [one.worker, "name"], [one.state || "not known", one.state === "up" ? "good" : "bad"],
        meter(one.exec), meter(one.load), [bytes(one.held), "n"], [bytes(one.memory), "n"], [one.models, "n"],
      ])))];
  }

  events(from, to) {
    const rows = this.page.store.events.filter(([at]) => at >= from && at <= to).reverse();
    if (!rows.length) return [element("div", { class: "bar" }, "Nothing came or went in this stretch.")];
    return [this.table(["at", "what", ""], rows.map(([at, kind, text]) => this.row([[this.page.clock.text(at), "m"], kind, text])))];
  }

  settings(found) {
    const version = found.version ? `clockwork ${found.version}` : "of an unknown version";
    return [element("div", { class: "bar" }, `${version}${found.started ? `, started ${found.started}` : ""}`),
      this.table(["setting", "value", "from"], found.settings.map(([name, value, from]) => this.row(
        [[name, "m"], [value, "m name"], [from, from === "default" ? "muted" : ""]],
      )))];
  }
}
