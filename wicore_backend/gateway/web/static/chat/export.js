// Conversations as files.

import { download } from "../common/dom.js";
import { t } from "../common/i18n.js";
import { dataUrl } from "./pictures.js";
import { pathTo } from "./tree.js";

/** The versions shown, as Markdown. */
export async function exportConversation(store, conversation) {
  const messages = new Map((await store.messages(conversation.id)).map((message) => [message.id, message]));
  const parts = [`# ${conversation.title}`];
  for (const { role, text, pictures = [] } of pathTo(messages, conversation.head)) {
    parts.push(`## ${t(role === "user" ? "you" : "answer_of")}`);
    for (const { name, data } of pictures) parts.push(`![${name.replace(/[[\]\\]/g, "")}](${await dataUrl(data)})`);
    if (text) parts.push(text);
  }
  download(`${fileName(conversation.title)}.md`, "text/markdown", `${parts.join("\n\n")}\n`);
}

/** Everything there is, all versions and pictures, as JSON. */
export async function exportAll(store) {
  const conversations = [];
  for (const conversation of await store.conversations()) {
    const messages = await Promise.all((await store.messages(conversation.id)).map(portable));
    conversations.push({ ...conversation, messages });
  }
  const file = { format: "wicore-conversations", version: 1, exported: new Date().toISOString(), conversations };
  download(`wicore-${file.exported.slice(0, 10)}.json`, "application/json", JSON.stringify(file, null, 1));
}

async function portable({ pictures = [], ...message }) {
  return {
    ...message,
    pictures: await Promise.all(pictures.map(async (one) => ({ ...one, data: await dataUrl(one.data) }))),
  };
}

function fileName(title) {
  return (
    title
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 60) || "wicore"
  );
}
