// Prometheus's text format: enough of it to read a page of counters, gauges and histograms.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? +([^ ]+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

/** Map of names to lists of {labels, value}. Lines that are no samples are skipped. */
export function parseMetrics(page) {
  const families = new Map();
  for (const line of page.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const match = SAMPLE.exec(line);
    if (match === null) continue;
    const [, name, labels, text] = match;
    const value = numberOf(text);
    if (Number.isNaN(value)) continue;
    if (!families.has(name)) families.set(name, []);
    families.get(name).push({ labels: parseLabels(labels ?? ""), value });
  }
  return families;
}

function parseLabels(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL))
    labels[name] = value.replace(/\\(.)/g, (whole, letter) => ESCAPES[letter] ?? whole);
  return labels;
}

function numberOf(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/** A histogram, all its series as one: [[upper bound, count up to it], ...] in order; null if there is none. */
export function histogram(families, name) {
  const buckets = new Map();
  for (const { labels, value } of families.get(`${name}_bucket`) ?? []) {
    const bound = numberOf(labels.le);
    buckets.set(bound, (buckets.get(bound) ?? 0) + value);
  }
  return buckets.size === 0 ? null : [...buckets].sort(([a], [b]) => a - b);
}

/** What was counted between two readings of a histogram; null if it began anew between them. */
export function difference(later, earlier) {
  const before = new Map(earlier ?? []);
  const counted = later.map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
  return counted.some(([, count]) => count < 0) ? null : counted;
}

/**
 * The value below which a share of the observations lies, as close as the buckets tell: evenly spread within one. The
 * last bucket has no end, so that its lower bound stands for it. Null if nothing was observed.
 */
export function quantile(buckets, share) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total === 0) return null;
  const rank = share * total;
  let [lower, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= rank && count > below) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (rank - below)) / (count - below);
    }
    [lower, below] = [bound, count];
  }
  return lower;
}
