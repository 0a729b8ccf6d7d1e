// Nodes are built, never parsed from text: nothing that a model or a person writes can become markup.

/**
 * An element with properties and children. `class` sets className, `data` the dataset, `on` listeners by event; names
 * with a dash are attributes, all others are properties of the element.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Paths on a grid of 24 by 24, drawn with a stroke. */
const ICONS = {
  chart: "M4 20V4M4 20h16M8 15l3.5-4 3 2.5L20 7",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  code: "M9 8l-4 4 4 4M15 8l4 4-4 4",
  copy: "M9 9h10v11H9zM15 9V5H5v11h4",
  down: "M12 5v14M6 13l6 6 6-6",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  left: "M14 6l-6 6 6 6",
  message: "M5 5h14v11H11l-4 4v-4H5z",
  pause: "M9 6v12M15 6v12",
  picture: "M4 5h16v14H4zM4 16l4.5-4.5 4 4 3-3L20 17M15.5 9.5h.01",
  play: "M8 5.5v13l10-6.5z",
  plus: "M12 5v14M5 12h14",
  pulse: "M3 12h4l3-7 4 14 3-7h4",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  right: "M10 6l6 6-6 6",
  sidebar: "M4 5h16v14H4zM9.5 5v14",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  stop: "M8 8h8v8H8z",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  up: "M12 19V5M6 11l6-6 6 6",
};

/** An icon that only decorates: what it stands on has a name of its own. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button that shows an icon alone, named for those who cannot see it. */
export function iconButton(name, label, onClick) {
  return h(
    "button",
    { type: "button", class: "icon-button small", "aria-label": label, title: label, on: { click: onClick } },
    icon(name),
  );
}

/** The elements of a page by their ids, and a clear error for one that is missing. */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`the page has no element with the id ${id}`);
  return element;
}

/** Puts icons where the page's HTML asks for them. */
export function fillIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) {
    if (element.firstElementChild === null) element.prepend(icon(element.dataset.icon));
    if (element.tagName === "SPAN") element.classList.add("icon-slot");
  }
}

/** Gives a file that was made here to the person. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
