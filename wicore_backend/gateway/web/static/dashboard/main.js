// The dashboard: polls /status and /metrics, and draws them.

import { ApiError, request } from "../common/api.js";
import { askForKey, prepareDialogs } from "../common/dialogs.js";
import { byId, fillIcons, h, icon } from "../common/dom.js";
import { bytes, duration, locale, number, sentence, t, translatePage } from "../common/i18n.js";
import { applyTheme, preferences } from "../common/preferences.js";
import { histogram, parseMetrics } from "../common/prometheus.js";
import { serverStatus } from "../common/server_status.js";
import { Chart } from "./chart.js";
import { INTERVAL_MS, Readings, tierOf, tiersOf } from "./readings.js";
import { fillTables } from "./tables.js";

const LATENCIES = {
  ttft: "wicore_gateway_ttft_seconds",
  tpot: "wicore_gateway_tpot_seconds",
  request: "wicore_gateway_request_seconds",
};
const QUANTILES = [
  ["median", 0.5],
  ["p95", 0.95],
  ["p99", 0.99],
];

const readings = new Readings();
let paused = false;
let shownUntil = null; // while paused
let locked = false;

const percent = (share) => number(share, { style: "percent", maximumFractionDigits: 1 });
const ofTiers = (value) => (shown, latest) =>
  tiersOf(latest?.status).map((tier) => ({
    name: t(`tier_${tier}`),
    values: shown.map((reading) => value(reading, tier)),
  }));
const quantiles = (name) => (shown) =>
  QUANTILES.map(([label, share]) => ({
    name: t(label),
    values: shown.map((reading) => readings.quantile(reading, name, share)),
  }));
const sumOfTiers = (name) => (status) =>
  status.tiers.length ? status.tiers.reduce((sum, tier) => sum + (tier[name] ?? 0), 0) : null;
const perSecond = (format) => (value) => `${format(value)}/${t("s")}`;

/** [name of the texts, how a value is written, what is drawn, what else the chart is told] */
const CHARTS = [
  [
    "load",
    number,
    (shown) =>
      ["running", "waiting"].map((name) => ({
        name: t(name),
        values: shown.map(({ status }) => status?.[name] ?? null),
      })),
    { top: 4 },
  ],
  [
    "throughput",
    perSecond(number),
    (shown) => [
      {
        name: t("generated"),
        values: shown.map((reading) => readings.rate(reading, (status) => status.generatedTokens)),
      },
      { name: t("prompts"), values: shown.map((reading) => readings.rate(reading, (status) => status.promptTokens)) },
    ],
    { top: 4 },
  ],
  ["ttft", duration, quantiles("ttft")],
  ["tpot", duration, quantiles("tpot")],
  ["e2e", duration, quantiles("request")],
  [
    "hit_rate",
    percent,
    ofTiers((reading, tier) =>
      readings.share(
        reading,
        (status) => tierOf(status, tier)?.foundTokens ?? null,
        (status) => (status.foundTokens === null ? null : status.foundTokens + status.missedTokens),
      ),
    ),
    { top: 1 },
  ],
  ["tier_fill", percent, ofTiers(({ status }, tier) => tierOf(status, tier)?.share ?? null), { top: 1 }],
  [
    "traffic",
    perSecond(bytes),
    (shown) =>
      ["stored", "loaded"].map((name) => ({
        name: t(name),
        values: shown.map((reading) => readings.rate(reading, sumOfTiers(name))),
      })),
    { top: 1024, binary: true },
  ],
].map(([name, format, series, more = {}]) => ({
  series,
  chart: new Chart({ title: () => t(name), note: () => t(`${name}_more`), format, ...more }),
}));

const span = byId("span");

function show() {
  const to = shownUntil ?? Math.max(Date.now(), readings.latest?.at ?? 0);
  const from = to - Number(span.value) * 60_000;
  const shown = readings.since(from).filter(({ at }) => at <= to);
  const latest = shown.findLast(({ status }) => status !== null) ?? null;
  const times = shown.map(({ at }) => at);
  for (const { chart, series } of CHARTS) chart.show({ times, series: series(shown, latest), from, to });
  showTiles(shown.at(-1) ?? null);
  fillTables(latest?.status ?? null);
  showState();
}

function showTiles(reading) {
  const status = reading?.status ?? null;
  const speed = reading && readings.rate(reading, (one) => one.generatedTokens);
  const ttft = reading && readings.quantile(reading, "ttft", 0.5);
  const prompts = status && status.foundTokens !== null ? status.foundTokens + status.missedTokens : 0;
  const tiles = [
    [t("running"), status?.running ?? null, number],
    [t("waiting"), status?.waiting ?? null, number],
    [t("throughput"), speed, number],
    [t("ttft"), ttft, duration],
    [t("hit_rate"), prompts > 0 ? status.foundTokens / prompts : null, percent],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value, format]) =>
      h("div", { class: "card tile" }, h("dt", {}, name), h("dd", {}, value === null ? "–" : format(value))),
    ),
  );
}

function showState() {
  const { latest } = readings;
  const clock = new Intl.DateTimeFormat(locale(), { timeStyle: "medium", hour12: false });
  const state = byId("state");
  const name =
    latest === null ? null : latest.status === null ? "no_answer" : latest.status.ready ? "ready" : "not_ready";
  state.hidden = name === null;
  state.className = `pill ${name ?? ""}`;
  state.textContent = name === null ? "" : t(name);
  const words = [];
  if (latest?.status?.server) words.push(latest.status.server);
  if (latest?.status?.uptime) words.push(t("uptime", { time: age(latest.status.uptime) }));
  if (paused) words.push(t("paused_at", { time: clock.format(shownUntil) }));
  else if (latest) words.push(t("last_update", { time: clock.format(latest.at) }));
  byId("about").textContent = words.join(" · ");
  byId("trouble").hidden = !(latest?.status && !latest.status.ready && latest.status.reason);
  byId("trouble").textContent = sentence(latest?.status?.reason ?? "");
}

function age(seconds) {
  const units = [
    ["day", 86400],
    ["hour", 3600],
    ["minute", 60],
    ["second", 1],
  ];
  const [unit, size] = units.find(([, one]) => seconds >= one) ?? units.at(-1);
  return number(Math.floor(seconds / size), { style: "unit", unit, unitDisplay: "long" });
}

async function read() {
  const [status, latencies] = await Promise.allSettled([serverStatus(), readLatencies()]);
  const refused = [status, latencies].map(({ reason }) => reason).filter((reason) => reason instanceof ApiError);
  if (refused.some(({ status: code }) => code === 401)) await unlock();
  byId("metrics-locked").hidden = !(latencies.reason instanceof ApiError && latencies.reason.status === 403);
  readings.add({ at: Date.now(), status: status.value ?? null, latencies: latencies.value ?? null });
}

async function readLatencies() {
  const families = parseMetrics(await (await request("metrics")).text());
  return Object.fromEntries(Object.entries(LATENCIES).map(([name, family]) => [name, histogram(families, family)]));
}

/** Asks for a key once; then a button does, so that nobody is asked every two seconds. */
async function unlock() {
  byId("give-key").hidden = false;
  if (locked) return;
  locked = true;
  if (await askForKey()) byId("give-key").hidden = true;
}

byId("give-key").addEventListener("click", async () => {
  if (await askForKey()) byId("give-key").hidden = true;
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  shownUntil = paused ? Date.now() : null;
  translate();
});
span.addEventListener("change", show);
document.addEventListener("keydown", (event) => {
  if (event.key === " " && event.target === document.body) {
    event.preventDefault();
    byId("pause").click();
  }
});

byId("theme").addEventListener("change", ({ target }) => preferences.set("theme", target.value));
byId("language").addEventListener("change", ({ target }) => preferences.set("language", target.value));
preferences.watch((name) => (name === "theme" ? applyTheme() : name === "language" && translate()));

function translate() {
  translatePage();
  for (const option of span.options) option.textContent = t("span_minutes", { n: number(Number(option.value)) });
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").replaceChildren(icon(paused ? "play" : "pause"), t(paused ? "resume" : "pause"));
  document.title = t("dashboard_title");
  show();
}

prepareDialogs();
fillIcons();
byId("theme").value = preferences.get("theme");
byId("language").value = preferences.get("language");
byId("charts").append(...CHARTS.map(({ chart }) => chart.element));
translate();
document.documentElement.dataset.ready = "";
for (;;) {
  await read();
  if (!paused) show();
  await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
}
