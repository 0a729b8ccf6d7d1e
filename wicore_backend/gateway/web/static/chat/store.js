// Conversations, kept in the browser's IndexedDB; or in memory alone where there is none.

const NAME = "wicore";
const VERSION = 1;

function open() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, VERSION);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("another tab holds an older version"));
  });
}

function settled(thing) {
  return new Promise((resolve, reject) => {
    thing.onsuccess = thing.oncomplete = () => resolve(thing.result);
    thing.onerror = thing.onabort = () => reject(thing.error);
  });
}

class DatabaseStore {
  durable = true;

  constructor(database) {
    this.database = database;
    database.onversionchange = () => database.close();
  }

  conversations() {
    return settled(this.database.transaction("conversations").objectStore("conversations").getAll());
  }

  messages(conversation) {
    return settled(
      this.database.transaction("messages").objectStore("messages").index("conversation").getAll(conversation),
    );
  }

  /** Writes both or neither. */
  async save({ conversation, messages = [] }) {
    const writing = this.database.transaction(["conversations", "messages"], "readwrite");
    if (conversation) writing.objectStore("conversations").put(conversation);
    for (const message of messages) writing.objectStore("messages").put(message);
    await settled(writing);
  }

  async remove(conversation) {
    const writing = this.database.transaction(["conversations", "messages"], "readwrite");
    writing.objectStore("conversations").delete(conversation);
    const messages = writing.objectStore("messages");
    for (const id of await settled(messages.index("conversation").getAllKeys(conversation))) messages.delete(id);
    await settled(writing);
  }
}

class MemoryStore {
  durable = false;
  kept = { conversations: new Map(), messages: new Map() };

  async conversations() {
    return [...this.kept.conversations.values()];
  }

  async messages(conversation) {
    return [...this.kept.messages.values()].filter((message) => message.conversation === conversation);
  }

  async save({ conversation, messages = [] }) {
    if (conversation) this.kept.conversations.set(conversation.id, conversation);
    for (const message of messages) this.kept.messages.set(message.id, message);
  }

  async remove(conversation) {
    this.kept.conversations.delete(conversation);
    for (const [id, message] of this.kept.messages)
      if (message.conversation === conversation) this.kept.messages.delete(id);
  }
}

export async function openStore() {
  try {
    return new DatabaseStore(await open());
  } catch (error) {
    console.warn("No history: this browser keeps no database for the page.", error);
    return new MemoryStore();
  }
}
