// What /status says, in the terms of the pages.

import { json } from "./api.js";

/** Tiers of the KV cache, the fastest first. */
export const TIERS = ["device", "host", "nvme"];

/**
 * {ready, reason, running, waiting, tiers, foundTokens, missedTokens, ...}. A tier is {tier, share, bytes,
 * foundTokens, stored, loaded}: `share` is 0 to 1 or null, what its fullest part holds of its room; `stored` and
 * `loaded` are bytes since the start.
 */
export async function serverStatus(options) {
  return inOurTerms(await json("status", options));
}

export function inOurTerms(status) {
  const { load, cache } = status;
  return {
    ready: status.ready,
    reason: status.reason ?? "",
    server: status.server ?? "",
    uptime: status.gateway?.uptime_s ?? null,
    models: status.models ?? [],
    executors: status.executors ?? [],
    devices: status.devices ?? [],
    running: load?.running ?? null,
    waiting: load?.waiting ?? null,
    promptTokens: load?.prompt_tokens_total ?? null,
    generatedTokens: load?.generated_tokens_total ?? null,
    outcomes: load?.requests_total ?? {},
    rejected: load?.rejected_total ?? {},
    foundTokens: cache?.found_tokens ?? null,
    missedTokens: cache?.missed_tokens ?? null,
    reasons: cache?.reasons ?? [],
    tiers: (cache?.tiers ?? []).filter(({ tier }) => TIERS.includes(tier)).map(tierInOurTerms),
  };
}

function tierInOurTerms(tier) {
  const shares = (tier.groups ?? [])
    .filter(({ used, capacity }) => used !== null && capacity)
    .map(({ used, capacity }) => used / capacity);
  if (tier.disk_bytes) shares.push(tier.used_disk_bytes / tier.disk_bytes);
  return {
    tier: tier.tier,
    share: shares.length ? Math.min(1, Math.max(...shares)) : null,
    bytes: tier.used_disk_bytes ?? tier.used_bytes ?? null,
    foundTokens: tier.found_tokens ?? null,
    stored: tier.stored_bytes ?? null,
    loaded: tier.loaded_bytes ?? null,
  };
}
