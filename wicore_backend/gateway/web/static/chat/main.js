// The chat page: what belongs together is put together here.

import { json } from "../common/api.js";
import { askForKey, prepareDialogs } from "../common/dialogs.js";
import { byId, fillIcons, h, icon } from "../common/dom.js";
import { t, translatePage } from "../common/i18n.js";
import { applyTheme, preferences } from "../common/preferences.js";
import { Announcer } from "./announcer.js";
import { Answers } from "./answers.js";
import { Chats } from "./chats.js";
import { Composer } from "./composer.js";
import { exportAll, exportConversation } from "./export.js";
import { Layout } from "./layout.js";
import { confirmOn } from "./message.js";
import { Panel } from "./panel.js";
import { SettingsDialog } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { Transcript } from "./transcript.js";
import { pathTo, versions } from "./tree.js";

const store = await openStore();
const chats = new Chats(store);
const answers = new Answers(chats);
const announcer = new Announcer();
const panel = new Panel();
const layout = new Layout((open) => panel.setOpen(open));
const composer = new Composer();
const settings = new SettingsDialog();

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    confirmOn(button);
    announcer.say(t("copied"));
  } catch {
    announcer.say(t("copy_failed"));
  }
}

const transcript = new Transcript(chats, {
  copy,
  edit: (message) => composer.edit(message),
  version: (message) => chats.show(message),
  versions(message) {
    const all = versions(chats.messages, message);
    return { all, index: all.indexOf(message) };
  },
  again: (message) => answerOnce(() => answerAnew(message)),
  retry: (message) =>
    answerOnce(() => (message.text === "" ? answerInto(pathTo(chats.messages, message.id)) : answerAnew(message))),
  async giveKey(message) {
    if (await askForKey()) await keyGiven(message);
  },
});

const sidebar = new Sidebar(chats, answers, {
  open: async ({ id }) => {
    await openConversation(id);
    layout.leaveSidebar();
    composer.focus();
  },
  rename: ({ id }, title) => chats.rename(id, title),
  export: (conversation) => exportConversation(store, conversation),
  remove: confirmRemoval,
});

// Answers

async function answerOnce(start) {
  if (chats.current && !answers.running(chats.current.id)) await start();
}

/** Answers into the last message of a path. */
async function answerInto(path) {
  const message = path.at(-1);
  transcript.goToEnd();
  await answers.answer(message, path.slice(0, -1));
  if (message.failure?.kind === "key" && message.conversation === chats.current?.id && (await askForKey()))
    await keyGiven(message);
}

/** Another answer to the same question, beside those there are. */
async function answerAnew({ parent }) {
  await answerInto(await chats.append(parent, { role: "assistant", text: "", state: "waiting" }));
}

async function keyGiven(message) {
  panel.askAgain();
  await listModels();
  await answerOnce(() => answerInto(pathTo(chats.messages, message.id)));
}

async function ask({ text, pictures, editing }) {
  const parent = editing ? editing.parent : (chats.current?.head ?? null);
  const question = { role: "user", text, pictures };
  await answerInto(await chats.append(parent, question, { role: "assistant", text: "", state: "waiting" }));
}

composer.addEventListener("send", ({ detail }) => answerOrStart(detail));
composer.addEventListener("stop", () => chats.current && answers.stop(chats.current.id));
composer.addEventListener("editlast", () => {
  const question = chats.path.findLast(({ role }) => role === "user");
  if (question && !answers.running(chats.current.id)) composer.edit(question);
});

async function answerOrStart(detail) {
  if (chats.current === null) await ask(detail);
  else await answerOnce(() => ask(detail));
}

function showProgress() {
  const run = chats.current ? answers.running(chats.current.id) : undefined;
  composer.setBusy(run !== undefined);
  const last = chats.path.findLast(({ figures }) => figures);
  panel.follow(run?.meter ?? null, last?.figures ?? null);
}

answers.addEventListener("start", showProgress);
answers.addEventListener("end", showProgress);
answers.addEventListener("start", ({ detail }) => isShown(detail) && announcer.begin(t("announce_started")));
answers.addEventListener("piece", ({ detail }) => {
  if (!isShown(detail)) return;
  panel.follow(answers.running(detail.conversation)?.meter ?? null, null);
  announcer.follow(detail.text);
});
answers.addEventListener("end", ({ detail }) => {
  if (isShown(detail) && detail.state !== "failed")
    announcer.end(detail.text, t(detail.state === "done" ? "announce_done" : "stopped"));
});

function isShown(message) {
  return message.conversation === chats.current?.id;
}

// Conversations

chats.addEventListener("path", () => {
  const { current, path } = chats;
  transcript.show();
  byId("welcome").hidden = path.length > 0;
  showTitle();
  history.replaceState(null, "", current ? `#${current.id}` : location.pathname + location.search);
  showProgress();
});

function showTitle() {
  const title = chats.current?.title;
  byId("title").textContent = title || t("untitled");
  document.title = title ? `${title} · Wicore` : "Wicore";
}

chats.addEventListener("unsaved", () => composer.complain(t("not_saved")));

async function openConversation(id) {
  composer.stopEditing();
  await chats.open(id, (message) => {
    const coming = answers.running(message.conversation)?.message;
    return coming?.id === message.id ? coming : undefined;
  });
}

function startNew() {
  composer.stopEditing();
  chats.startNew();
  layout.leaveSidebar();
  composer.focus();
}

function confirmRemoval(conversation) {
  const dialog = byId("delete-dialog");
  byId("delete-which").textContent = t("delete_more", { title: conversation.title || t("untitled") });
  byId("delete-confirm").onclick = async () => {
    dialog.close();
    answers.stop(conversation.id);
    await chats.remove(conversation.id);
    composer.focus();
  };
  dialog.showModal();
}

byId("new").addEventListener("click", startNew);
byId("export-all").addEventListener("click", () => exportAll(store));
byId("open-settings").addEventListener("click", () => settings.open());

// Models

async function listModels() {
  const select = byId("model");
  let names = [];
  try {
    names = (await json("v1/models")).data.map(({ id }) => id);
  } catch {
    // The question itself will say what is wrong.
  }
  const chosen = preferences.get("model");
  if (names.length === 0 && chosen) names = [chosen];
  select.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === chosen }, name)));
  select.hidden = names.length === 0;
  if (names.length > 0 && !names.includes(chosen)) preferences.set("model", names[0]);
}

byId("model").addEventListener("change", ({ target }) => preferences.set("model", target.value));

// Suggestions

function showSuggestions() {
  const suggestion = (name, glyph, act) =>
    h("li", {}, h("button", { type: "button", class: "button", on: { click: act } }, icon(glyph), t(name)));
  const asking = (name) => () => answerOrStart({ text: t(name), pictures: [], editing: null });
  byId("suggestions").replaceChildren(
    suggestion("suggest_picture", "picture", () => {
      composer.fill(t("suggest_picture_question"));
      composer.pick();
    }),
    ...["suggest_sum", "suggest_reverse", "suggest_count"].map((name) => suggestion(name, "message", asking(name))),
  );
}

// Keyboard

function escape() {
  if (chats.current && answers.running(chats.current.id)) answers.stop(chats.current.id);
  else if (composer.editing) composer.stopEditing();
  else layout.leaveSidebar();
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  const writing = event.target.matches("input, textarea, select");
  const act =
    event.key === "Escape"
      ? escape
      : command && event.shiftKey && event.key.toLowerCase() === "o"
        ? startNew
        : command && event.key.toLowerCase() === "b"
          ? () => layout.toggleSidebar()
          : writing || command
            ? null
            : event.key === "/"
              ? () => composer.focus()
              : event.key === "?"
                ? () => settings.open()
                : null;
  if (act === null) return;
  event.preventDefault();
  act();
});

// Languages and themes

function translate() {
  translatePage();
  showTitle();
  showSuggestions();
  sidebar.show();
  settings.translate();
  composer.translate();
  panel.translate();
}

preferences.watch((name) => {
  if (name === "theme") applyTheme();
  if (name === "language") {
    translate();
    transcript.show({ anew: true });
  }
});

prepareDialogs();
fillIcons();
translate();
layout.restore();
composer.focus();
await chats.reload();
const wanted = location.hash.slice(1);
if (chats.conversations.some(({ id }) => id === wanted)) await openConversation(wanted);
else chats.startNew();
document.documentElement.dataset.ready = ""; // for tests: what can be used is there
await listModels();
