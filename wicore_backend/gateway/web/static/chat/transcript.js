// The messages on the page, and where the page stands among them.

import { byId, h } from "../common/dom.js";
import { t } from "../common/i18n.js";
import { MessageView } from "./message.js";

const SHOWN_AT_FIRST = 40;
const AT_END_PX = 48;

export class Transcript {
  #views = new Map(); // message id -> MessageView
  #scroll = byId("scroll");
  #list = byId("transcript");
  #toEnd = byId("to-end");
  #atEnd = true;
  #shown = SHOWN_AT_FIRST;
  #conversation = null;

  constructor(chats, acts) {
    Object.assign(this, { chats, acts });
    this.#scroll.addEventListener("scroll", () => this.#looked(), { passive: true });
    const growth = new ResizeObserver(() => this.#follow());
    for (const element of [this.#scroll, this.#list]) growth.observe(element);
    this.#toEnd.addEventListener("click", () => this.goToEnd());
    chats.addEventListener("message", ({ detail }) => this.#views.get(detail.id)?.update());
  }

  /** Shows the path of the current conversation; messages that stay keep their elements. */
  show({ anew = false } = {}) {
    const { path, current } = this.chats;
    if (anew || current?.id !== this.#conversation) this.#clear(current?.id ?? null);
    const hidden = Math.max(0, path.length - this.#shown);
    const visible = path.slice(hidden);
    const ids = new Set(visible.map(({ id }) => id));
    for (const [id, view] of this.#views) {
      if (ids.has(id)) continue;
      view.remove();
      this.#views.delete(id);
    }
    this.#list.querySelector(".earlier")?.remove();
    let last = null;
    for (const message of visible) {
      let view = this.#views.get(message.id);
      if (view) view.show();
      else this.#views.set(message.id, (view = new MessageView(message, this.acts, () => this.#follow())));
      if (last ? view.element.previousElementSibling !== last : this.#list.firstElementChild !== view.element) {
        if (last) last.after(view.element);
        else this.#list.prepend(view.element);
      }
      last = view.element;
    }
    if (hidden > 0) this.#list.prepend(this.#earlier(hidden));
    this.#follow();
  }

  goToEnd() {
    this.#atEnd = true;
    this.#follow();
  }

  focus(message) {
    this.#views.get(message.id)?.element.querySelector("button")?.focus();
  }

  #clear(conversation) {
    for (const view of this.#views.values()) view.remove();
    this.#views.clear();
    this.#list.replaceChildren();
    this.#conversation = conversation;
    this.#shown = SHOWN_AT_FIRST;
    this.#atEnd = true;
  }

  #earlier(hidden) {
    const show = () => {
      const fromEnd = this.#scroll.scrollHeight - this.#scroll.scrollTop;
      this.#shown += SHOWN_AT_FIRST * 2;
      this.#atEnd = false;
      this.show();
      this.#scroll.scrollTop = this.#scroll.scrollHeight - fromEnd; // what was in view stays in view
    };
    return h("button", { type: "button", class: "button earlier", on: { click: show } }, t("earlier", { n: hidden }));
  }

  #looked() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroll;
    this.#atEnd = scrollHeight - scrollTop - clientHeight < AT_END_PX;
    this.#toEnd.hidden = this.#atEnd;
  }

  /** Stays at the end while the text grows, if that is where the reader is. */
  #follow() {
    if (this.#atEnd) this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#looked();
  }
}
