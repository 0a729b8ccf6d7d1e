// What is better read than drawn.

import { byId, h } from "../common/dom.js";
import { bytes, number, phrase, t } from "../common/i18n.js";

export function fillTables(status) {
  const outcomes = Object.entries({ ...status?.outcomes, ...status?.rejected }).filter(([, count]) => count > 0);
  fill(
    "outcomes",
    outcomes.map(([name, count]) => [phrase(name), number(count)]),
  );
  const reasons = (status?.reasons ?? []).filter(({ count }) => count > 0);
  fill(
    "reasons",
    reasons.map(({ reason, count, unit }) => [phrase(reason), `${number(count)} ${phrase(unit)}`]),
  );
  fill(
    "models",
    (status?.models ?? []).map(({ name, version, ready }) => [
      name,
      version,
      modelState(ready, status.executors.find(({ model }) => model === name)),
    ]),
  );
  fill(
    "devices",
    (status?.devices ?? []).map((device) => [device.name, deviceState(device)]),
  );
  byId("devices").closest("section").hidden = !status?.devices.length;
}

function modelState(ready, executor) {
  const state = t(ready ? "ready" : "not_ready");
  return executor ? h("span", { title: executor.reason }, `${state} · ${executor.name}`) : state;
}

function deviceState({ utilization, memory_used_bytes: used, memory_total_bytes: total, power_watts: power }) {
  const parts = [];
  if (utilization !== null && utilization !== undefined) parts.push(number(utilization, { style: "percent" }));
  if (total) parts.push(`${bytes(used)} / ${bytes(total)}`);
  if (power) parts.push(`${number(power, { maximumFractionDigits: 0 })} W`);
  return parts.join(" · ");
}

function fill(id, rows) {
  const shown = rows.length ? rows : [[t("no_data")]];
  byId(id).replaceChildren(...shown.map((cells) => h("tr", {}, ...cells.map((cell) => h("td", {}, cell)))));
}
