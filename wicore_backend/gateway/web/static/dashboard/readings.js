// What was read of the server over time, and what follows from it.

import { difference, quantile } from "../common/prometheus.js";
import { TIERS } from "../common/server_status.js";

export const INTERVAL_MS = 2000;
const KEPT_MS = 60 * 60_000;
const RATE_OVER_MS = 10_000;
const QUANTILE_OVER_MS = 60_000;
const GAP_MS = 3 * INTERVAL_MS; // more between two readings, and the line breaks

/**
 * A reading is {at, status, latencies}: ms, the page's terms of /status or null, {ttft, tpot, request}: histograms or
 * null.
 */
export class Readings {
  #all = [];

  add(reading) {
    this.#all.push(reading);
    while (this.#all[0].at < reading.at - KEPT_MS) this.#all.shift();
  }

  get latest() {
    return this.#all.at(-1) ?? null;
  }

  /** The readings since a time, with an empty one wherever some are missing, so that gaps are drawn as gaps. */
  since(time) {
    const shown = this.#all.filter(({ at }) => at >= time);
    return shown.flatMap((reading, index) => {
      const before = shown[index - 1];
      return before && reading.at - before.at > GAP_MS
        ? [{ at: before.at + 1, status: null, latencies: null }, reading]
        : [reading];
    });
  }

  /** Per second, of a counter, over the last seconds. */
  rate(reading, counter) {
    const change = this.#change(reading, RATE_OVER_MS, (one) => (one.status ? counter(one.status) : null));
    return change === null ? null : (change.amount * 1000) / change.took;
  }

  /** How much of one counter's growth is another's: of the prompt tokens, those found. */
  share(reading, part, whole) {
    const of = this.#change(reading, RATE_OVER_MS, (one) => (one.status ? whole(one.status) : null));
    const hits = this.#change(reading, RATE_OVER_MS, (one) => (one.status ? part(one.status) : null));
    return of === null || hits === null || of.amount === 0 ? null : Math.min(1, hits.amount / of.amount);
  }

  /** A quantile of a latency over the last minute. */
  quantile(reading, name, share) {
    const now = reading.latencies?.[name];
    const then = this.#before(reading, QUANTILE_OVER_MS, (one) => one.latencies?.[name] ?? null);
    if (!now || then === null) return null;
    const counted = difference(now, then.latencies[name]);
    return counted === null ? null : quantile(counted, share);
  }

  #change(reading, over, counter) {
    const now = counter(reading);
    const then = this.#before(reading, over, counter);
    if (now === null || then === null) return null;
    const amount = now - counter(then);
    return amount < 0 ? null : { amount, took: reading.at - then.at }; // a counter that fell began anew
  }

  /** The earliest reading within a time before another that has the value, with no gap between them. */
  #before(reading, over, value) {
    let found = null;
    let next = reading;
    for (let index = this.#all.lastIndexOf(reading) - 1; index >= 0; index -= 1) {
      const one = this.#all[index];
      if (one.at < reading.at - over || next.at - one.at > GAP_MS || value(one) === null) break;
      found = next = one;
    }
    return found;
  }
}

/** Tiers that a server has. */
export function tiersOf(status) {
  return TIERS.filter((name) => status?.tiers.some(({ tier }) => tier === name));
}

export function tierOf(status, name) {
  return status?.tiers.find(({ tier }) => tier === name) ?? null;
}
