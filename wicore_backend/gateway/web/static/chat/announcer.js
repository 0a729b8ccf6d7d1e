// Tells screen readers of an answer, in sentences and not too often: a live region on the text itself would never
// stop talking.

import { byId } from "../common/dom.js";

const QUIET_MS = 4000;

export class Announcer {
  #region = byId("announcer");
  #said = 0; // characters of the answer
  #last = 0;

  say(text) {
    this.#region.textContent = text;
    this.#last = performance.now();
  }

  begin(text) {
    this.#said = 0;
    this.say(text);
  }

  /** The answer so far: whole sentences of what is new, if it has been quiet for a while. */
  follow(text) {
    if (performance.now() - this.#last < QUIET_MS) return;
    const fresh = text.slice(this.#said);
    const end = Math.max(...["\n", ". ", "? ", "! ", "。", "？", "！"].map((mark) => fresh.lastIndexOf(mark))) + 1;
    if (end === 0) return;
    this.#said += end;
    this.say(fresh.slice(0, end));
  }

  end(text, closing) {
    this.say(`${text.slice(this.#said)} ${closing}`);
    this.#said = text.length;
  }
}
