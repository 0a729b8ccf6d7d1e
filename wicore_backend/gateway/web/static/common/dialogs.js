// Dialogs that both pages have.

import { byId } from "./dom.js";
import { apiKey } from "./preferences.js";

/** Wires what all dialogs have: buttons that close them, and clicks beside them. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const button of dialog.querySelectorAll("[data-close]"))
      button.addEventListener("click", () => dialog.close());
    dialog.addEventListener("pointerdown", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }
}

/** Asks for a key; true once one has been given, false if the person would rather not. */
export function askForKey() {
  const dialog = byId("key-dialog");
  const field = byId("asked-key");
  field.value = "";
  byId("remember-asked-key").checked = apiKey.remembered();
  dialog.returnValue = "";
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      apiKey.set(field.value, byId("remember-asked-key").checked);
      field.value = "";
      dialog.close("given");
    };
    dialog.onclose = () => resolve(dialog.returnValue === "given");
    if (!dialog.open) dialog.showModal();
    field.focus();
  });
}
