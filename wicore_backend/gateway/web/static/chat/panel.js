// The panel of live numbers: this answer, the tiers of the KV cache, the server.

import { ApiError } from "../common/api.js";
import { byId, h, svg } from "../common/dom.js";
import { bytes, duration, number, phrase, t } from "../common/i18n.js";
import { serverStatus } from "../common/server_status.js";

const POLL_MS = 2000;
const SAMPLE_MS = 250;

export class Panel {
  #meter = null;
  #figures = null; // of an answer that has ended
  #status = null;
  #trouble = "";
  #locked = false;
  #open = false;
  #lasting = null; // ends the polling

  /** Shows the numbers of an answer that comes, of one that came, or (null, null) of none. */
  follow(meter, figures) {
    this.#meter = meter;
    this.#figures = figures;
    this.showAnswer();
  }

  setOpen(open) {
    if (open === this.#open) return;
    this.#open = open;
    this.#lasting?.abort();
    if (!open) return;
    this.#locked = false;
    this.#lasting = new AbortController();
    this.#poll(this.#lasting.signal);
    const sampling = setInterval(() => this.#sample(), SAMPLE_MS);
    this.#lasting.signal.addEventListener("abort", () => clearInterval(sampling));
  }

  translate() {
    this.showAnswer();
    this.#showStatus();
  }

  /** A key was given: what was locked may be open now. */
  askAgain() {
    if (!this.#open) return;
    this.setOpen(false);
    this.setOpen(true);
  }

  #sample() {
    if (!this.#meter) return;
    this.#meter.sample();
    this.showAnswer();
  }

  showAnswer() {
    const live = this.#meter;
    const { speed, ttft, tokens, promptTokens, cachedTokens } = live ?? this.#figures ?? {};
    figure(
      "panel-speed",
      speed,
      (value) => number(value, { maximumFractionDigits: value < 100 ? 1 : 0 }),
      t("per_second"),
    );
    figure("panel-ttft", ttft, duration);
    const cached = cachedTokens ? t("cached_share", { n: number(cachedTokens) }) : t("tokens_unit");
    figure("panel-prompt", promptTokens, number, cached);
    figure("panel-answer", tokens, number, t("tokens_unit"));
    if (live) drawSpark(byId("panel-spark"), live.speeds);
    else if (!this.#figures) byId("panel-spark").replaceChildren();
  }

  async #poll(signal) {
    while (!signal.aborted) {
      if (!document.hidden) await this.#ask(signal);
      if (this.#locked) return; // until a key is given
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async #ask(signal) {
    try {
      this.#status = await serverStatus({ signal });
      this.#trouble = this.#status.ready ? "" : t("server_not_ready", { reason: phrase(this.#status.reason) });
    } catch (error) {
      if (signal.aborted) return;
      this.#status = null;
      this.#locked = error instanceof ApiError && [401, 403].includes(error.status);
      this.#trouble = t(this.#locked ? "server_locked" : "server_gone");
    }
    this.#showStatus();
  }

  #showStatus() {
    const status = this.#status;
    figure("panel-running", status?.running, number);
    figure("panel-waiting", status?.waiting, number);
    byId("panel-state").textContent = this.#trouble;
    const tiers = status?.tiers ?? [];
    byId("panel-tiers").replaceChildren(...tiers.map(tierItem));
    const prompts = (status?.foundTokens ?? 0) + (status?.missedTokens ?? 0);
    byId("panel-hits").textContent =
      tiers.length === 0
        ? status
          ? t("no_tiers")
          : ""
        : prompts > 0
          ? t("hits", { share: percent(status.foundTokens / prompts) })
          : "";
  }
}

function percent(share) {
  return number(share, { style: "percent", maximumFractionDigits: share < 0.1 ? 1 : 0 });
}

function tierItem({ tier, share, bytes: held }) {
  const words =
    share === null ? "–" : t("tier_share", { bytes: held === null ? "–" : bytes(held), share: percent(share) });
  const fill = h("i");
  fill.style.width = `${(share ?? 0) * 100}%`;
  const row = h("div", { class: "row" }, h("span", {}, t(`tier_${tier}`)), h("span", {}, words));
  return h("li", {}, row, h("div", { class: "meter", "aria-hidden": "true" }, fill));
}

function figure(id, value, format, unit) {
  const known = value !== null && value !== undefined;
  byId(id).replaceChildren(known ? format(value) : "–");
  if (known && unit) byId(id).append(" ", h("small", {}, unit));
}

const [WIDTH, HEIGHT] = [240, 44];

/** A curve of speeds, from its first value at the left to the latest at the right. */
function drawSpark(element, values) {
  const known = values.filter((value) => value !== null);
  if (known.length < 2) return element.replaceChildren();
  const top = Math.max(...known) * 1.1;
  const step = WIDTH / Math.max(values.length - 1, 1);
  const points = values.flatMap((value, index) =>
    value === null ? [] : [[index * step, HEIGHT - 2 - (value / top) * (HEIGHT - 6)]],
  );
  const line = `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
  const under = `${line}L${points.at(-1)[0].toFixed(1)} ${HEIGHT}L${points[0][0].toFixed(1)} ${HEIGHT}Z`;
  element.replaceChildren(svg("path", { class: "under", d: under }), svg("path", { d: line }));
}
