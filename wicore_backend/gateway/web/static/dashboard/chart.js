// A chart of lines over time, as SVG.

import { h, svg } from "../common/dom.js";
import { locale, t } from "../common/i18n.js";

const HEIGHT = 190;
const MARGIN = { top: 10, right: 8, bottom: 24, left: 70 };
const DASHES = ["", "6 4", "2 3.5"]; // lines differ in more than colour

/**
 * One chart with its title, legend and tooltip.
 *
 * It takes `series`: [{name, values}] beside `times` (ms); a value is a number or null, where the line breaks.
 */
export class Chart {
  #data = { times: [], series: [], from: 0, to: 1 };
  #at = null; // index of the reading that the tooltip tells of

  /**
   * @param {{title: () => string, note: () => string, format: (value: number) => string, top?: number, binary?:
   * boolean}} options `top`: the least that the axis reaches to; `binary`: its values are bytes, round in powers of
   * 1024
   */
  constructor(options) {
    this.options = options;
    this.heading = h("h2");
    this.note = h("p", { class: "chart-note" });
    this.legend = h("ul", { class: "legend" });
    this.drawing = svg("svg", { class: "drawing", height: HEIGHT, "aria-hidden": "true" });
    this.tooltip = h("div", { class: "tooltip", hidden: true, role: "status" });
    this.empty = h("p", { class: "empty" });
    this.plot = h("div", { class: "plot", tabIndex: 0, role: "group" }, this.drawing, this.empty, this.tooltip);
    this.element = h(
      "section",
      { class: "chart card" },
      h("div", { class: "chart-head" }, this.heading, this.note),
      this.legend,
      this.plot,
    );
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#leave());
    this.plot.addEventListener("blur", () => this.#leave());
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  show(data) {
    this.#data = data;
    this.draw();
  }

  draw() {
    const { title, note, top = 0, binary = false } = this.options;
    this.heading.textContent = title();
    this.note.textContent = note();
    const { times, series, from, to } = this.#data;
    this.empty.hidden = series.some(({ values }) => values.some((value) => value !== null));
    this.empty.textContent = t("no_data");
    this.#showLegend();
    this.width = this.plot.clientWidth;
    if (this.width === 0) return;
    const highest = Math.max(top, ...series.flatMap(({ values }) => values.map((value) => value ?? 0)));
    this.ticks = niceTicks(highest, binary);
    this.x = (time) => MARGIN.left + ((time - from) / (to - from)) * (this.width - MARGIN.left - MARGIN.right);
    this.y = (value) => HEIGHT - MARGIN.bottom - (value / this.ticks.at(-1)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    this.drawing.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.drawing.replaceChildren(
      ...this.#axes(from, to),
      ...series.flatMap(({ values }, index) => this.#line(times, values, index)),
    );
    this.#showTooltip();
  }

  #showLegend() {
    const { series } = this.#data;
    const items = series.map(({ name, values }, index) => {
      const swatch = svg(
        "svg",
        { class: `swatch series-${index + 1}`, viewBox: "0 0 22 6", "aria-hidden": "true" },
        svg("path", { d: "M1 3h20", "stroke-dasharray": DASHES[index] }),
      );
      const value = values.at(-1) ?? null;
      return h("li", {}, swatch, name, h("strong", {}, value === null ? "–" : this.options.format(value)));
    });
    this.legend.replaceChildren(...items);
    const now = series.map(
      ({ name, values }) =>
        `${name} ${(values.at(-1) ?? null) === null ? t("no_data") : this.options.format(values.at(-1))}`,
    );
    this.plot.setAttribute("aria-label", `${this.options.title()}. ${now.join(", ")}. ${t("chart_help")}`);
  }

  #axes(from, to) {
    const right = this.width - MARGIN.right;
    const rows = this.ticks.flatMap((tick) => {
      const y = this.y(tick);
      const label = svg("text", { x: MARGIN.left - 10, y: y + 4, "text-anchor": "end" }, this.options.format(tick));
      return [svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }), label];
    });
    const format = new Intl.DateTimeFormat(locale(), { hour: "2-digit", minute: "2-digit", hour12: false });
    const step = timeStep(to - from, this.width);
    const columns = [];
    for (let time = Math.ceil(from / step) * step; time <= to; time += step) {
      const x = this.x(time);
      if (x < MARGIN.left + 14 || x > right - 14) continue;
      columns.push(svg("text", { x, y: HEIGHT - 6, "text-anchor": "middle" }, format.format(time)));
    }
    return [...rows, ...columns];
  }

  /** The line, in as many parts as it has gaps; a part of one value is a dot. */
  #line(times, values, index) {
    const parts = [];
    let part = [];
    for (const [place, value] of [...values, null].entries()) {
      if (value !== null) part.push([this.x(times[place]), this.y(value)]);
      else if (part.length) {
        parts.push(part);
        part = [];
      }
    }
    const name = `series-${index + 1}`;
    return parts.map((points) => {
      if (points.length === 1) return svg("circle", { class: `dot ${name}`, cx: points[0][0], cy: points[0][1], r: 2 });
      const d = `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
      return svg("path", { class: `line ${name}`, d, "stroke-dasharray": DASHES[index] });
    });
  }

  #point(event) {
    const { times } = this.#data;
    if (times.length === 0) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    this.#at = times.reduce(
      (nearest, time, index) => (Math.abs(this.x(time) - x) < Math.abs(this.x(times[nearest]) - x) ? index : nearest),
      0,
    );
    this.#showTooltip();
  }

  #key(event) {
    const last = this.#data.times.length - 1;
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") return this.#leave();
    if (!(event.key in moves) || last < 0) return undefined;
    event.preventDefault();
    this.#at = Math.max(0, Math.min(last, (this.#at ?? last + 1) + moves[event.key]));
    return this.#showTooltip();
  }

  #leave() {
    this.#at = null;
    this.#showTooltip();
  }

  #showTooltip() {
    const { times, series } = this.#data;
    this.drawing.querySelector(".cursor")?.remove();
    this.tooltip.hidden = this.#at === null || times[this.#at] === undefined;
    if (this.tooltip.hidden) return;
    const time = new Intl.DateTimeFormat(locale(), { timeStyle: "medium", hour12: false }).format(times[this.#at]);
    const rows = series.map(({ name, values }) => {
      const value = values[this.#at] ?? null;
      return h("div", {}, h("span", {}, name), h("strong", {}, value === null ? t("gap") : this.options.format(value)));
    });
    this.tooltip.replaceChildren(h("time", {}, t("at_time", { time })), ...rows);
    const x = this.x(times[this.#at]);
    this.drawing.append(svg("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    const left = x + this.tooltip.offsetWidth + 20 > this.width ? x - this.tooltip.offsetWidth - 12 : x + 12;
    this.tooltip.style.left = `${Math.max(0, left)}px`;
  }
}

/** Ticks from zero to the first round number at or above the highest value. */
export function niceTicks(highest, binary = false) {
  if (highest <= 0) return [0, 1];
  const unit = binary ? 1024 ** Math.max(0, Math.floor(Math.log2(highest) / 10)) : 1;
  const power = 10 ** Math.floor(Math.log10(highest / unit / 4));
  const step = [1, 2, 2.5, 5, 10]
    .map((factor) => factor * power)
    .find((candidate) => candidate * 4 >= (highest / unit) * 0.999);
  const count = Math.max(1, Math.ceil(highest / unit / step - 0.001));
  return Array.from({ length: count + 1 }, (_, index) => Number((index * step).toPrecision(12)) * unit);
}

const MINUTE = 60_000;

function timeStep(span, width) {
  const most = Math.max(2, width / 90);
  return [1, 2, 5, 10, 15, 30].map((minutes) => minutes * MINUTE).find((step) => span / step <= most) ?? 60 * MINUTE;
}
