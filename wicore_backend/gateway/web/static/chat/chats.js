// The conversations there are, and the one on the page. What changes is told as events, and saved.

import { newestEnd, pathTo } from "./tree.js";

const TITLE_LENGTH = 60;
const UNFINISHED = new Set(["waiting", "retrying", "streaming"]);

/**
 * Events: "list" (conversations came, went or changed), "path" (other messages are shown), "message" (detail: one has
 * changed), "unsaved" (the browser did not take something; the page goes on with it).
 *
 * A conversation is {id, title, named, created, updated, head}; `head` is the last message shown, `named` that a
 * person gave the title.
 */
export class Chats extends EventTarget {
  conversations = [];
  current = null; // a conversation; null before the first question of a new one
  messages = new Map(); // of the current conversation

  constructor(store) {
    super();
    this.store = store;
  }

  get durable() {
    return this.store.durable;
  }

  /** The messages shown, in turn. */
  get path() {
    return this.current ? pathTo(this.messages, this.current.head) : [];
  }

  async reload() {
    this.conversations = await this.store.conversations();
    this.#listed();
  }

  /**
   * Shows a conversation.
   *
   * @param {(message) => object|undefined} coming the message itself if its answer is coming right now, and not what
   * was saved of it; an answer that is neither whole nor coming ended with the page that asked
   */
  async open(id, coming) {
    const conversation = this.conversations.find((one) => one.id === id) ?? null;
    const messages = conversation ? await this.store.messages(id) : [];
    this.current = conversation;
    this.messages = new Map(messages.map((message) => [message.id, coming(message) ?? ended(message)]));
    this.dispatchEvent(new Event("path"));
    this.#listed();
  }

  startNew() {
    this.current = null;
    this.messages = new Map();
    this.dispatchEvent(new Event("path"));
    this.#listed();
  }

  /**
   * Adds messages to the current conversation, each answering the one before, and shows them; the first starts a
   * conversation if there is none. Returns the path to the last.
   */
  async append(parent, ...drafts) {
    const now = Date.now();
    const created = this.current === null;
    this.current ??= { id: crypto.randomUUID(), title: "", named: false, created: now, updated: now, head: null };
    if (created) this.conversations.push(this.current);
    const messages = drafts.map((draft, index) => {
      const message = {
        id: crypto.randomUUID(),
        conversation: this.current.id,
        parent,
        created: now + index,
        ...draft,
      };
      parent = message.id;
      this.messages.set(message.id, message);
      return message;
    });
    if (!this.current.title) this.current.title = titleOf(messages[0]);
    this.current.head = parent;
    this.current.updated = now;
    this.dispatchEvent(new Event("path"));
    this.#listed();
    const path = this.path;
    await this.#save({ conversation: this.current, messages });
    return path;
  }

  /** Shows another version of a message, with the newest that follows it. */
  async show(message) {
    this.current.head = newestEnd(this.messages, message.id);
    this.dispatchEvent(new Event("path"));
    await this.#save({ conversation: this.current });
  }

  /** Tells that a message has changed, which may belong to a conversation that is not shown. */
  changed(message) {
    this.dispatchEvent(new CustomEvent("message", { detail: message }));
  }

  /** Writes a message down, unless its conversation is gone. */
  async keep(message) {
    if (this.conversations.some(({ id }) => id === message.conversation)) await this.#save({ messages: [message] });
  }

  async rename(id, title) {
    const conversation = this.conversations.find((one) => one.id === id);
    Object.assign(conversation, { title: title.trim().slice(0, 200), named: true });
    this.#listed();
    if (this.current?.id === id) this.dispatchEvent(new Event("path"));
    await this.#save({ conversation });
  }

  async remove(id) {
    this.conversations = this.conversations.filter((one) => one.id !== id);
    await this.store.remove(id);
    if (this.current?.id === id) this.startNew();
    else this.#listed();
  }

  async #save(what) {
    try {
      await this.store.save(what);
    } catch (error) {
      console.warn("Not saved:", error);
      this.dispatchEvent(new Event("unsaved"));
    }
  }

  #listed() {
    this.conversations.sort((a, b) => b.updated - a.updated);
    this.dispatchEvent(new Event("list"));
  }
}

function ended(message) {
  if (!UNFINISHED.has(message.state)) return message;
  return { ...message, state: "failed", failure: { kind: "interrupted", detail: "", retryAt: null } };
}

function titleOf({ text, pictures = [] }) {
  const line = text.trim().split("\n", 1)[0];
  if (line === "") return pictures.length ? pictures[0].name : "";
  const letters = [...line];
  return letters.length <= TITLE_LENGTH
    ? line
    : `${letters
        .slice(0, TITLE_LENGTH - 1)
        .join("")
        .trimEnd()}…`;
}
