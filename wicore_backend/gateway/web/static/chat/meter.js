// How fast an answer comes, as seen from the browser.

const WINDOW_MS = 2000;
const SHORTEST_MS = 50; // below it, a speed is chance

export class Meter {
  #began = performance.now();
  #first = null;
  #last = null;
  #arrivals = []; // {at, tokens}: tokens so far
  #chunks = 0;
  #usage = null;
  speeds = []; // one for each half second, for the curve

  /** A piece of text came. It counts as one token until the server says how many there were. */
  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#chunks += 1;
    this.#arrivals.push({ at: this.#last, tokens: this.tokens });
    while (this.#arrivals[0].at < this.#last - WINDOW_MS) this.#arrivals.shift();
  }

  /** The server told its counts. */
  usage(usage) {
    this.#usage = usage;
  }

  /** Of the answer so far. */
  get tokens() {
    return Math.max(this.#usage?.completion_tokens ?? 0, this.#chunks);
  }

  get promptTokens() {
    return this.#usage?.prompt_tokens ?? null;
  }

  get cachedTokens() {
    return this.#usage?.prompt_tokens_details?.cached_tokens ?? null;
  }

  /** Seconds from asking to the first text; null before it. */
  get ttft() {
    return this.#first === null ? null : (this.#first - this.#began) / 1000;
  }

  /** Tokens per second over the last two seconds; null while there is too little to say. */
  get speed() {
    const [oldest] = this.#arrivals;
    const took = performance.now() - (oldest?.at ?? Infinity);
    return took < SHORTEST_MS ? null : ((this.tokens - oldest.tokens) * 1000) / took;
  }

  /** Tokens per second of the whole answer, from the first text to the last; null for one that came at once. */
  get meanSpeed() {
    const took = this.#last - this.#first;
    return took < SHORTEST_MS ? null : ((this.tokens - 1) * 1000) / took;
  }

  /** Notes the present speed for the curve, which begins with the first that is known. */
  sample() {
    if (this.speed === null && this.speeds.length === 0) return;
    this.speeds.push(this.speed);
    if (this.speeds.length > 120) this.speeds.shift();
  }

  /** What is kept with the answer. */
  summary() {
    return {
      ttft: this.ttft,
      speed: this.meanSpeed,
      tokens: this.tokens,
      promptTokens: this.promptTokens,
      cachedTokens: this.cachedTokens,
    };
  }
}
