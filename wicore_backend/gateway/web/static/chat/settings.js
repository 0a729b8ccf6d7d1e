// The dialog of settings.

import { byId, h } from "../common/dom.js";
import { t } from "../common/i18n.js";
import { apiKey, preferences } from "../common/preferences.js";

const MODIFIER = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

/** Keys as they are shown, and what they do. */
const SHORTCUTS = [
  [["Enter"], "shortcut_send"],
  [["Shift", "Enter"], "shortcut_line"],
  [["Esc"], "shortcut_stop"],
  [["↑"], "shortcut_edit"],
  [["/"], "shortcut_focus"],
  [[MODIFIER, "Shift", "O"], "shortcut_new"],
  [[MODIFIER, "B"], "shortcut_sidebar"],
  [["?"], "shortcut_settings"],
];

/** Changes take effect as they are made. */
export class SettingsDialog {
  #dialog = byId("settings");

  constructor() {
    byId("system").addEventListener("change", ({ target }) => preferences.set("system", target.value));
    this.#number("temperature", "temperature");
    this.#number("max-tokens", "maxTokens");
    byId("language").addEventListener("change", ({ target }) => preferences.set("language", target.value));
    for (const choice of this.#themes())
      choice.addEventListener("change", () => preferences.set("theme", choice.value));
    for (const id of ["key", "remember-key"])
      byId(id).addEventListener("change", () => apiKey.set(byId("key").value, byId("remember-key").checked));
  }

  open() {
    byId("system").value = preferences.get("system");
    byId("temperature").value = preferences.get("temperature") ?? "";
    byId("max-tokens").value = preferences.get("maxTokens") ?? "";
    byId("language").value = preferences.get("language");
    for (const choice of this.#themes()) choice.checked = choice.value === preferences.get("theme");
    byId("key").value = apiKey.get();
    byId("remember-key").checked = apiKey.remembered();
    this.translate();
    this.#dialog.showModal();
  }

  translate() {
    const rows = SHORTCUTS.map(([keys, name]) => {
      const shown = keys.flatMap((key, index) => (index ? [" ", h("kbd", {}, key)] : [h("kbd", {}, key)]));
      return h("div", {}, h("dt", {}, t(name)), h("dd", {}, ...shown));
    });
    byId("shortcuts").replaceChildren(...rows);
  }

  #themes() {
    return this.#dialog.querySelectorAll("input[name=theme]");
  }

  #number(id, preference) {
    byId(id).addEventListener("change", ({ target }) => {
      if (target.reportValidity()) preferences.set(preference, target.value === "" ? null : target.valueAsNumber);
    });
  }
}
