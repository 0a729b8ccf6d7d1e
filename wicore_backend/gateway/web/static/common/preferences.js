// What a person has chosen, kept in this browser alone.

const PLACE = "wicore.preferences";
const KEY = "wicore.key";

const DEFAULTS = {
  language: "auto",
  theme: "auto",
  model: "",
  system: "",
  temperature: null, // null: as the model's own configuration has it
  maxTokens: null,
  sidebar: null, // null: as the width of the screen suggests
  panel: null,
};

/** Storage that may be forbidden, as in some private windows: then choices last as long as the page. */
function attempt(action, otherwise) {
  try {
    return action();
  } catch {
    return otherwise;
  }
}

const values = { ...DEFAULTS, ...attempt(() => JSON.parse(localStorage.getItem(PLACE) ?? "{}"), {}) };
const listeners = new Set();

export const preferences = {
  get: (name) => values[name],

  set(name, value) {
    if (!(name in DEFAULTS)) throw new Error(`there is no preference ${name}`);
    values[name] = value;
    attempt(() => localStorage.setItem(PLACE, JSON.stringify(values)));
    for (const listener of listeners) listener(name, value);
  },

  /** Calls back with the name and the value of what changes. */
  watch: (listener) => listeners.add(listener),
};

let keyOfThisPage = attempt(() => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY), null) ?? "";

/**
 * The key for the server. It leaves the browser in requests to the server that the page came from, and nowhere else.
 */
export const apiKey = {
  get: () => keyOfThisPage,
  remembered: () => attempt(() => localStorage.getItem(KEY) !== null, false),

  /** Keeps it for this tab or, if asked to, for later visits. */
  set(key, remember) {
    keyOfThisPage = key.trim();
    for (const [storage, keep] of [
      ["sessionStorage", !remember],
      ["localStorage", remember],
    ]) {
      attempt(() =>
        keep && keyOfThisPage ? window[storage].setItem(KEY, keyOfThisPage) : window[storage].removeItem(KEY),
      );
    }
  },
};

export function applyTheme() {
  const theme = preferences.get("theme");
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
