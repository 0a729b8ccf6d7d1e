// Words in the person's language.

import { preferences } from "./preferences.js";
import { PHRASES, STRINGS } from "./strings.js";

/** "en" or "zh": the one chosen, or else the first of the browser's that there is. */
export function language() {
  const chosen = preferences.get("language");
  if (chosen in STRINGS) return chosen;
  const known = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in STRINGS);
  return known ?? "en";
}

/** A text with its {places} filled in. */
export function t(name, places = {}) {
  const text = STRINGS[language()][name];
  if (text === undefined) throw new Error(`there is no text ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, place) => places[place]);
}

/** The server's own words, in the person's language where they are known. */
export function phrase(text) {
  const known = PHRASES[language()] ?? {};
  return Object.hasOwn(known, text) ? known[text] : text;
}

/** The server's words as a sentence among others. One may begin with a parameter's name, which stays as it is. */
export function sentence(text) {
  const told = phrase(text.trim());
  const begun = told.replace(/^(the|a|an|this|no|there) /, (word) => word.charAt(0).toUpperCase() + word.slice(1));
  return !begun || /[.!?。！？…]$/.test(begun) ? begun : `${begun}${language() === "zh" ? "。" : "."}`;
}

/** A number as the language writes it. */
export function number(value, options = {}) {
  return new Intl.NumberFormat(locale(), { maximumFractionDigits: 1, ...options }).format(value);
}

export function locale() {
  return language() === "zh" ? "zh-CN" : "en";
}

/** Seconds, in milliseconds below one. */
export function duration(seconds) {
  if (seconds < 1) return `${number(seconds * 1000, { maximumFractionDigits: seconds < 0.01 ? 1 : 0 })} ${t("ms")}`;
  return `${number(seconds, { maximumFractionDigits: seconds < 10 ? 2 : 1 })} ${t("s")}`;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes in binary units. */
export function bytes(count) {
  const power = count < 1 ? 0 : Math.min(Math.floor(Math.log2(count) / 10), UNITS.length - 1);
  return `${number(count / 1024 ** power, { maximumSignificantDigits: 3 })} ${UNITS[power]}`;
}

/** Puts the texts into the page's HTML, where data-t, data-t-label and data-t-placeholder ask for them. */
export function translatePage() {
  document.documentElement.lang = locale();
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-placeholder]"))
    element.placeholder = t(element.dataset.tPlaceholder);
  for (const element of document.querySelectorAll("[data-t-label]")) {
    const label = t(element.dataset.tLabel);
    element.setAttribute("aria-label", label);
    if (element.tagName === "BUTTON") element.title = label;
  }
}
