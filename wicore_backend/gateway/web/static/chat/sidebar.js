// The list of conversations.

import { byId, h, iconButton } from "../common/dom.js";
import { t } from "../common/i18n.js";

const SEARCH_FROM = 8; // conversations

export class Sidebar {
  #list = byId("conversations");
  #search = byId("search");
  #renaming = null;

  /** @param acts open, rename, export, remove; each takes a conversation */
  constructor(chats, answers, acts) {
    Object.assign(this, { chats, answers, acts });
    this.#search.addEventListener("input", () => this.show());
    chats.addEventListener("list", () => this.show());
    for (const event of ["start", "end"]) answers.addEventListener(event, () => this.show());
  }

  show() {
    if (this.#renaming !== null) return; // it is shown anew when the name is given
    const { conversations } = this.chats;
    byId("search-box").hidden = conversations.length < SEARCH_FROM;
    const wanted = byId("search-box").hidden ? "" : this.#search.value.trim().toLowerCase();
    const found = conversations.filter(({ title }) => title.toLowerCase().includes(wanted));
    const focused = this.#list.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    this.#list.replaceChildren(...found.map((conversation) => this.#item(conversation)));
    if (focused) this.#list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
    const note = byId("no-conversations");
    note.hidden = found.length > 0;
    note.textContent = t(conversations.length ? "none_found" : this.chats.durable ? "no_conversations" : "no_history");
  }

  #item(conversation) {
    const title = conversation.title || t("untitled");
    const current = this.chats.current?.id === conversation.id;
    const open = h(
      "button",
      { type: "button", class: "open", title, on: { click: () => this.acts.open(conversation) } },
      title,
    );
    open.dataset.focus = `${conversation.id} open`;
    if (current) open.setAttribute("aria-current", "page");
    open.classList.toggle("busy", this.answers.running(conversation.id) !== undefined);
    const item = h("li", { class: current ? "current" : "" });
    const tool = (name, label, act) => {
      const button = iconButton(name, t(label, { title }), act);
      button.dataset.focus = `${conversation.id} ${name}`;
      return button;
    };
    const tools = h(
      "span",
      { class: "tools" },
      tool("edit", "rename_which", () => this.#rename(item, conversation, title)),
      tool("download", "export_which", () => this.acts.export(conversation)),
      tool("trash", "delete_which", () => this.acts.remove(conversation)),
    );
    item.append(open, tools);
    return item;
  }

  #rename(item, conversation, title) {
    const field = h("input", { type: "text", value: title, maxLength: 200, "aria-label": t("new_name") });
    this.#renaming = conversation.id;
    const end = async (name) => {
      if (this.#renaming === null) return;
      this.#renaming = null;
      if (name !== null && name.trim() !== "" && name !== title) await this.acts.rename(conversation, name);
      this.show();
      this.#list.querySelector(`[data-focus="${CSS.escape(`${conversation.id} edit`)}"]`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(field.value);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(null);
      }
    });
    field.addEventListener("blur", () => end(field.value));
    item.replaceChildren(field);
    field.select();
    field.focus();
  }
}
