// A conversation is a tree of messages: an edited question or another try at an answer is a sibling, and nothing is
// lost.
//
// A message is {id, conversation, parent, role, text, pictures, created, ...}; `parent` is null for the first question.

/** From the first question to the message, the one read on the page. */
export function pathTo(messages, id) {
  const path = [];
  for (let message = messages.get(id); message; message = messages.get(message.parent)) path.push(message);
  return path.reverse();
}

/** The versions of a message, itself among them, the oldest first. */
export function versions(messages, message) {
  return [...messages.values()]
    .filter((other) => other.parent === message.parent)
    .sort((a, b) => a.created - b.created);
}

/** The newest end of the paths that go through a message: where it was last talked on. */
export function newestEnd(messages, id) {
  const parents = new Set([...messages.values()].map(({ parent }) => parent));
  const ends = [...messages.values()].filter(
    (message) => !parents.has(message.id) && goesThrough(messages, message, id),
  );
  return ends.reduce((newest, end) => (end.created > newest.created ? end : newest)).id;
}

function goesThrough(messages, message, id) {
  for (let one = message; one; one = messages.get(one.parent)) if (one.id === id) return true;
  return false;
}

/**
 * What goes to the server for a path: its messages in turn. Answers that never came are left out, and questions that
 * then follow one another are joined, since models want turns.
 *
 * @param {(picture) => string} url of a picture, as the wire takes it
 */
export function wireMessages(path, system, url) {
  const turns = [];
  for (const { role, text, pictures = [] } of path) {
    if (role === "assistant" && text === "") continue;
    const parts = [...pictures.map((picture) => ({ type: "image_url", image_url: { url: url(picture) } }))];
    if (text !== "") parts.push({ type: "text", text });
    if (turns.at(-1)?.role === role) turns.at(-1).content.push(...parts);
    else turns.push({ role, content: parts });
  }
  const messages = turns.map(({ role, content }) => ({ role, content: plainIfText(content) }));
  return system.trim() === "" ? messages : [{ role: "system", content: system.trim() }, ...messages];
}

function plainIfText(parts) {
  if (parts.some((part) => part.type !== "text")) return parts;
  return parts.map((part) => part.text).join("\n\n");
}
