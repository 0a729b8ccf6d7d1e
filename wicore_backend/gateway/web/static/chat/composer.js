// Where questions are written.

import { byId, h, icon } from "../common/dom.js";
import { t } from "../common/i18n.js";
import { BadPictureError, filesOf, MOST_PICTURES, pictureElement, prepare } from "./pictures.js";

/** Events: "send" (detail: {text, pictures, editing}), "stop", "editlast" (up arrow in an empty field). */
export class Composer extends EventTarget {
  #field = byId("question");
  #form = byId("composer");
  #files = byId("files");
  #pictures = [];
  #editing = null; // the question that is edited
  #draft = null; // what stood here before
  #preparing = 0;
  #busy = false;

  constructor() {
    super();
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#field.addEventListener("keydown", (event) => this.#key(event));
    this.#field.addEventListener("input", () => this.#changed());
    byId("stop").addEventListener("click", () => this.dispatchEvent(new Event("stop")));
    byId("stop-editing").addEventListener("click", () => this.stopEditing());
    byId("attach").addEventListener("click", () => this.pick());
    this.#files.addEventListener("change", async () => {
      const files = [...this.#files.files];
      this.#files.value = "";
      await this.add(files);
    });
    this.#takePastes();
    this.#takeDrops();
    this.#changed();
  }

  focus() {
    this.#field.focus();
  }

  /** Opens the browser's choice of files. */
  pick() {
    this.#files.click();
  }

  get empty() {
    return this.#field.value === "" && this.#pictures.length === 0;
  }

  get editing() {
    return this.#editing !== null;
  }

  fill(text) {
    this.#field.value = text;
    this.#changed();
    this.focus();
  }

  /** Whether an answer is coming: then the button stops it. */
  setBusy(busy) {
    this.#busy = busy;
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    byId("stop").hidden = !busy;
    byId("send").hidden = busy;
    if (focused) this.focus();
    this.#changed();
  }

  edit(message) {
    if (!this.editing) this.#draft = { text: this.#field.value, pictures: this.#pictures };
    this.#editing = message;
    this.#pictures = [...(message.pictures ?? [])];
    byId("editing").hidden = false;
    this.#showThumbnails();
    this.fill(message.text);
    this.#field.setSelectionRange(message.text.length, message.text.length);
  }

  stopEditing() {
    if (!this.editing) return;
    this.#clear();
    this.#pictures = this.#draft.pictures;
    this.#showThumbnails();
    this.fill(this.#draft.text);
  }

  /** Takes files as pictures, and says which are none. */
  async add(files) {
    this.complain("");
    for (const file of files) {
      if (this.#pictures.length + this.#preparing >= MOST_PICTURES) {
        this.complain(t("too_many_pictures", { n: MOST_PICTURES }));
        break;
      }
      this.#preparing += 1;
      try {
        this.#pictures.push(await prepare(file));
      } catch (error) {
        if (!(error instanceof BadPictureError)) throw error;
        this.complain(t("bad_picture", { name: error.fileName }));
      } finally {
        this.#preparing -= 1;
      }
      this.#showThumbnails();
    }
    this.#changed();
    this.focus();
  }

  translate() {
    this.#showThumbnails();
  }

  #send() {
    if (this.#busy || this.#preparing > 0 || (this.#field.value.trim() === "" && this.#pictures.length === 0)) return;
    const detail = { text: this.#field.value.trim(), pictures: this.#pictures, editing: this.#editing };
    this.#clear();
    this.dispatchEvent(new CustomEvent("send", { detail }));
  }

  #clear() {
    this.#field.value = "";
    this.#pictures = [];
    this.#editing = null;
    byId("editing").hidden = true;
    this.complain("");
    this.#showThumbnails();
    this.#changed();
  }

  #key(event) {
    const composing = event.isComposing || event.keyCode === 229; // Enter chooses Chinese characters then
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !composing) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && this.empty) {
      event.preventDefault();
      this.dispatchEvent(new Event("editlast"));
    }
  }

  #changed() {
    byId("send").disabled = this.#preparing > 0 || (this.#field.value.trim() === "" && this.#pictures.length === 0);
    if (!CSS.supports("field-sizing", "content")) {
      this.#field.style.height = "auto";
      this.#field.style.height = `${this.#field.scrollHeight}px`;
    }
  }

  /** Says what is wrong, above the field; "" takes it back. */
  complain(words) {
    byId("composer-error").textContent = words;
    byId("composer-error").hidden = words === "";
  }

  #showThumbnails() {
    const list = byId("thumbnails");
    list.hidden = this.#pictures.length === 0;
    list.replaceChildren(
      ...this.#pictures.map((picture, index) => {
        const label = t("remove_picture", { name: picture.name });
        const remove = h(
          "button",
          { type: "button", class: "icon-button", "aria-label": label, title: label },
          icon("close"),
        );
        remove.addEventListener("click", () => {
          this.#pictures = this.#pictures.filter((other) => other !== picture);
          this.#showThumbnails();
          this.#changed();
          this.focus();
        });
        return h("li", {}, pictureElement(picture, t("picture_n", { n: index + 1 })), remove);
      }),
    );
  }

  #takePastes() {
    document.addEventListener("paste", (event) => {
      const files = filesOf(event.clipboardData);
      // Cells of a table come as text, and as a picture of it.
      const hasText = event.clipboardData.types.includes("text/plain");
      if (files.length === 0 || hasText || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.add(files);
    });
  }

  #takeDrops() {
    const overlay = byId("drop");
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      overlay.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) overlay.hidden = true;
    });
    addEventListener("drop", (event) => {
      overlay.hidden = true;
      if (!carriesFiles(event)) return;
      event.preventDefault(); // or the browser would leave the page for the file
      this.add([...event.dataTransfer.files]);
    });
  }
}
