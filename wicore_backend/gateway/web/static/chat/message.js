// One message on the page.

import { h, icon, iconButton } from "../common/dom.js";
import { duration, number, t } from "../common/i18n.js";
import { secondsToWait, wordsOf } from "./failure.js";
import { MarkdownView } from "./markdown.js";
import { pictureElement } from "./pictures.js";

const RENDERING_SHARE = 5; // after rendering for a time, rest four times as long

/** A question or an answer, with what can be done about it. `acts` has copy, edit, again, retry, giveKey, version. */
export class MessageView {
  #nextAt = 0;
  #scheduled = false;
  #countdown = null;

  constructor(message, acts, grew) {
    Object.assign(this, { message, acts, grew });
    const { role } = message;
    this.text = h("div", { class: role === "user" ? "text" : "prose", lang: "" });
    this.state = h("div", { class: "state", hidden: true });
    this.tools = h("div", { class: "message-tools" });
    const name = h("h2", { class: "visually-hidden" }, t(role === "user" ? "you" : "answer_of"));
    this.element = h("article", { class: `message ${role}`, data: { id: message.id } }, name);
    if (message.pictures?.length) this.element.append(this.#pictures(message.pictures));
    this.element.append(this.text, this.state, this.tools);
    this.markdown = new MarkdownView(this.text, (text) => acts.copy(text));
    if (role === "user") this.text.append(message.text);
    if (role === "user" && message.text === "") this.text.hidden = true;
    this.show();
  }

  /** Shows the message as it is now; text soon, so that many pieces cost one rendering. */
  update() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    const wait = Math.max(0, this.#nextAt - performance.now());
    const render = () => {
      this.#scheduled = false;
      const began = performance.now();
      this.show();
      const ended = performance.now();
      this.#nextAt = ended + (ended - began) * (RENDERING_SHARE - 1);
    };
    setTimeout(() => requestAnimationFrame(render), wait);
  }

  show() {
    if (this.message.role === "assistant") this.#showAnswer();
    this.#showTools();
    this.grew();
  }

  remove() {
    clearInterval(this.#countdown);
    this.element.remove();
  }

  get #busy() {
    return ["waiting", "retrying", "streaming"].includes(this.message.state);
  }

  #showAnswer() {
    const { text, state } = this.message;
    this.element.classList.toggle("streaming", this.#busy);
    this.element.setAttribute("aria-busy", String(this.#busy));
    if (state === "waiting" && text === "") {
      this.text.replaceChildren(
        h("span", { class: "thinking", role: "img", "aria-label": t("thinking") }, h("i"), h("i"), h("i")),
      );
      this.markdown = new MarkdownView(this.text, this.acts.copy);
    } else if (text !== "") {
      this.text.querySelector(":scope > .thinking")?.remove();
      this.markdown.show(text, { whole: !this.#busy });
    } else {
      this.text.replaceChildren();
    }
    this.#showState();
  }

  #showState() {
    clearInterval(this.#countdown);
    const { state, failure, finish } = this.message;
    const words = h("p", {});
    const parts = [words];
    let error = false;
    if (state === "retrying" || state === "failed") {
      error = state === "failed";
      this.#tellFailure(words, parts, failure, state === "retrying");
    } else if (state === "stopped") words.append(t("stopped"));
    else if (finish === "length") words.append(t("cut_off"));
    else if (state === "done" && !["stop", "tool_calls", null].includes(finish))
      words.append(t("filtered", { reason: finish }));
    else parts.length = 0;
    this.state.hidden = parts.length === 0;
    this.state.classList.toggle("error", error);
    if (error) this.state.setAttribute("role", "alert");
    else this.state.removeAttribute("role");
    this.state.replaceChildren(...parts);
  }

  #tellFailure(words, parts, failure, retrying) {
    const retry = h(
      "button",
      { type: "button", class: "button", on: { click: () => this.acts.retry(this.message) } },
      t("retry"),
    );
    if (!retrying) parts.push(failure.kind === "key" ? this.#keyButton() : retry);
    const tick = () => {
      words.textContent = wordsOf(failure, { retrying });
      retry.disabled = secondsToWait(failure) > 0;
      if (secondsToWait(failure) === 0) clearInterval(this.#countdown);
    };
    this.#countdown = setInterval(tick, 500);
    tick();
  }

  #keyButton() {
    return h(
      "button",
      { type: "button", class: "button", on: { click: () => this.acts.giveKey(this.message) } },
      t("give_key"),
    );
  }

  #pictures(pictures) {
    const items = pictures.map((picture, index) =>
      h("li", {}, pictureElement(picture, t("picture_n", { n: index + 1 }))),
    );
    return h("ul", { class: "pictures", "aria-label": t("pictures") }, ...items);
  }

  #showTools() {
    const { message, acts } = this;
    const parts = [];
    const { index, all } = acts.versions(message);
    if (all.length > 1) parts.push(this.#versions(index, all));
    if (!this.#busy) {
      const buttons = [];
      if (message.text !== "")
        buttons.push(iconButton("copy", t("copy"), (event) => acts.copy(message.text, event.currentTarget)));
      if (message.role === "user") buttons.push(iconButton("edit", t("edit"), () => acts.edit(message)));
      else if (message.state !== "failed") buttons.push(iconButton("again", t("again"), () => acts.again(message)));
      parts.push(h("span", { class: "acts" }, ...buttons));
      if (message.figures) parts.push(h("span", { class: "metrics" }, figures(message.figures)));
    }
    const focused = this.tools.contains(document.activeElement)
      ? document.activeElement.getAttribute("aria-label")
      : null;
    this.tools.replaceChildren(...parts);
    if (focused !== null) this.tools.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }

  #versions(index, all) {
    const turn = (name, label, step) => {
      const button = iconButton(name, t(label), () => this.acts.version(all[index + step]));
      button.disabled = all[index + step] === undefined;
      return button;
    };
    const where = h(
      "span",
      { "aria-label": t("version_n", { n: index + 1, of: all.length }), role: "img" },
      `${index + 1} / ${all.length}`,
    );
    return h(
      "span",
      { class: "versions" },
      turn("left", "previous_version", -1),
      where,
      turn("right", "next_version", 1),
    );
  }
}

function figures({ speed, ttft, tokens, promptTokens, cachedTokens }) {
  const words = [];
  if (speed !== null) words.push(t("tokens_per_second", { n: number(speed) }));
  if (ttft !== null) words.push(t("first_token_after", { time: duration(ttft) }));
  words.push(t("tokens", { n: number(tokens) }));
  if (cachedTokens) words.push(t("of_them_cached", { n: number(cachedTokens), of: number(promptTokens) }));
  return words.join(" · ");
}

/** Marks a button as done for a moment. */
export function confirmOn(button) {
  if (!button) return;
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}
