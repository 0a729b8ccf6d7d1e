// Gets answers: one at a time for each conversation, whichever is shown.

import { preferences } from "../common/preferences.js";
import { complete } from "./completion.js";
import { failureOf, secondsToWait } from "./failure.js";
import { Meter } from "./meter.js";
import { dataUrl } from "./pictures.js";
import { wireMessages } from "./tree.js";

const RETRIES = 5;
const DEFAULT_WAIT_S = 2;
const SAVE_EVERY_MS = 1000;

/**
 * Events, each with the answer's message as its detail: "start", "piece" (more text, or another state), "end".
 *
 * An answer's `state` is "waiting" (asked, nothing came), "retrying" (`failure` says until when), "streaming",
 * "done", "stopped" or "failed" (`failure` says why).
 */
export class Answers extends EventTarget {
  #running = new Map(); // conversation id -> {message, abort, meter}

  constructor(chats) {
    super();
    this.chats = chats;
  }

  /** What is being answered in a conversation: {message, meter, abort}, or undefined. */
  running(conversation) {
    return this.#running.get(conversation);
  }

  stop(conversation) {
    this.#running.get(conversation)?.abort.abort();
  }

  /** Answers the last question of a path into a message that follows it. Ends when the answer has, however it did. */
  async answer(message, path) {
    const run = { message, abort: new AbortController(), meter: new Meter() };
    this.#running.set(message.conversation, run);
    Object.assign(message, { text: "", state: "waiting", failure: null, finish: null, figures: null });
    this.#tell("start", message);
    const saving = setInterval(() => this.chats.keep(message), SAVE_EVERY_MS);
    try {
      await this.#untilAnswered(run, await this.#request(path));
    } catch (error) {
      if (run.abort.signal.aborted) message.state = "stopped";
      else Object.assign(message, { state: "failed", failure: failureOf(error) });
    } finally {
      clearInterval(saving);
      this.#running.delete(message.conversation);
      if (message.text !== "") message.figures = run.meter.summary();
      this.#tell("end", message);
      await this.chats.keep(message);
    }
  }

  async #request(path) {
    const urls = new Map();
    for (const picture of path.flatMap(({ pictures = [] }) => pictures)) urls.set(picture, await dataUrl(picture.data));
    const body = {
      model: preferences.get("model"),
      messages: wireMessages(path, preferences.get("system"), (one) => urls.get(one)),
    };
    if (preferences.get("temperature") !== null) body.temperature = preferences.get("temperature");
    if (preferences.get("maxTokens") !== null) body.max_completion_tokens = preferences.get("maxTokens");
    return body;
  }

  /** A server that is busy or starting is asked again, as long as nothing of the answer has come. */
  async #untilAnswered(run, body) {
    const { message, abort } = run;
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await this.#stream(run, body);
      } catch (error) {
        const failure = failureOf(error);
        if (abort.signal.aborted || message.text !== "" || failure.kind !== "unavailable" || attempt > RETRIES)
          throw error;
        failure.retryAt ??= Date.now() + DEFAULT_WAIT_S * 1000;
        Object.assign(message, { state: "retrying", failure });
        this.#tell("piece", message);
        await pause(secondsToWait(failure) * 1000, abort.signal);
        Object.assign(message, { state: "waiting", failure: null });
        run.meter = new Meter();
        this.#tell("piece", message);
      }
    }
  }

  async #stream({ message, abort, meter }, body) {
    for await (const { text, usage, finish } of complete(body, { signal: abort.signal })) {
      if (usage) meter.usage(usage);
      if (finish) message.finish = finish;
      if (text) {
        meter.piece();
        message.text += text;
        message.state = "streaming";
      }
      this.#tell("piece", message);
    }
    message.state = "done";
  }

  #tell(kind, message) {
    this.dispatchEvent(new CustomEvent(kind, { detail: message }));
    this.chats.changed(message);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        reject(signal.reason);
      },
      { once: true },
    );
  });
}
