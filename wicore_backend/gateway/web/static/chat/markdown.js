// Markdown of a model, as nodes. The lexer finds the structure; every node is built here, from a list of kinds that
// are known to be harmless. HTML in an answer is shown as the text that it is, pictures in it become links (loading
// them would tell whoever serves them), and links go to the web or to mail.

import { h, iconButton } from "../common/dom.js";
import { t } from "../common/i18n.js";
import { Lexer } from "../vendor/marked.esm.js";

const LEXING = { gfm: true, breaks: true };
const TOO_SLOW_MS = 400;
const LINKS = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  mdash: "—",
  ndash: "–",
  hellip: "…",
  times: "×",
};

/** Shows a text that grows: what stands before its last two blocks is not touched again. */
export class MarkdownView {
  #blocks = []; // {raw, node}
  #settled = 0; // characters of the blocks that stay
  #plain = false; // the text is too much for the lexer

  /** @param {(text: string) => void} copy what a code block's button does */
  constructor(element, copy) {
    this.element = element;
    this.copy = copy;
  }

  /**
   * Shows the text as it is now. At its end everything is looked at once more, since a later line can give an earlier
   * one sense.
   */
  show(text, { whole }) {
    const source = text.replaceAll("\r\n", "\n");
    const from = whole ? 0 : this.#settled;
    const tokens = this.#plain ? null : this.#lex(source.slice(from));
    if (tokens === null) return this.#showPlain(source);
    let at = 0;
    if (!whole) while (at < this.#blocks.length && this.#blocks[at].end <= from) at += 1;
    let end = from;
    for (const token of tokens) {
      end += token.raw.length;
      if (token.type === "space" || token.type === "def") continue;
      this.#place(at, token, end);
      at += 1;
    }
    for (const { node } of this.#blocks.splice(at)) node.remove();
    this.#settled = this.#blocks.length > 2 ? this.#blocks.at(-3).end : 0;
  }

  #lex(source) {
    const began = performance.now();
    try {
      return new Lexer(LEXING).lex(source);
    } catch {
      return null; // nested too deeply for its recursion
    } finally {
      if (performance.now() - began > TOO_SLOW_MS) this.#plain = true;
    }
  }

  #showPlain(source) {
    this.#plain = true;
    this.#blocks = [];
    this.element.replaceChildren(h("div", { class: "plain" }, source));
  }

  #place(at, token, end) {
    const old = this.#blocks[at];
    if (old?.raw === token.raw && old.type === token.type) {
      old.end = end;
      return;
    }
    if (old?.type === "code" && token.type === "code" && growCode(old.node, token)) {
      Object.assign(old, { raw: token.raw, end });
      return;
    }
    let node;
    try {
      node = this.#block(token);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      node = h("div", { class: "plain" }, token.raw); // nested too deeply
    }
    if (old) old.node.replaceWith(node);
    else this.element.append(node);
    this.#blocks[at] = { raw: token.raw, type: token.type, node, end };
  }

  #block(token) {
    switch (token.type) {
      case "heading":
        // The page's own headings are the first three levels.
        return h(`h${Math.min(token.depth + 2, 6)}`, { class: `level-${token.depth}` }, ...inline(token.tokens));
      case "paragraph":
        return h("p", {}, ...inline(token.tokens));
      case "code":
        return this.#code(token);
      case "blockquote":
        return h("blockquote", {}, ...this.#nested(token.tokens));
      case "list":
        return h(
          token.ordered ? "ol" : "ul",
          token.ordered ? { start: token.start } : {},
          ...token.items.map((item) => this.#item(item)),
        );
      case "table":
        return table(token);
      case "hr":
        return h("hr");
      default:
        return h("p", { class: "plain" }, token.raw.trimEnd()); // HTML, and whatever else there may be
    }
  }

  #nested(tokens, { loose = false } = {}) {
    const shown = tokens.filter(({ type }) => type !== "space" && type !== "def");
    return shown.flatMap((token) => {
      if (token.type === "checkbox") return inline([token]);
      if (token.type !== "text") return [this.#block(token)];
      return loose ? [h("p", {}, ...inline([token]))] : inline([token]);
    });
  }

  #item(item) {
    return h("li", { class: item.task ? "task" : "" }, ...this.#nested(item.tokens, { loose: item.loose }));
  }

  #code(token) {
    const code = h("code", {}, token.text);
    const name = (token.lang ?? "").match(/^[\w+#.-]{1,30}/)?.[0] ?? "";
    const copy = iconButton("copy", t("copy_code"), () => this.copy(code.textContent));
    const head = h("div", { class: "code-head" }, h("span", {}, name), copy);
    return h("div", { class: "code" }, head, h("pre", { tabIndex: 0 }, code));
  }
}

/** Adds to a code block what is new; false if it did not only grow. */
function growCode(node, token) {
  const text = node.querySelector("code").firstChild;
  if (!text || !token.text.startsWith(text.data)) return false;
  text.appendData(token.text.slice(text.data.length));
  return true;
}

function table({ header, rows }) {
  const cell =
    (tag) =>
    ({ tokens, align }) =>
      h(tag, { class: { right: "right", center: "centred" }[align] ?? "" }, ...inline(tokens));
  const head = h("thead", {}, h("tr", {}, ...header.map(cell("th"))));
  const body = h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map(cell("td")))));
  return h("div", { class: "table" }, h("table", {}, head, body));
}

const WRAPPERS = { strong: "strong", em: "em", del: "del" };

function inline(tokens) {
  return tokens.flatMap((token) => {
    if (token.type in WRAPPERS) return [h(WRAPPERS[token.type], {}, ...inline(token.tokens))];
    switch (token.type) {
      case "text":
        return token.tokens ? inline(token.tokens) : [decoded(token.text)];
      case "escape":
        return [token.text];
      case "codespan":
        return [h("code", {}, token.text)];
      case "br":
        return [h("br")];
      case "checkbox":
        return [token.checked ? "☑ " : "☐ "];
      case "link":
        return link(token.href, inline(token.tokens));
      case "image":
        return link(token.href, [token.text || token.href]);
      default:
        return [token.raw]; // HTML
    }
  });
}

function link(href, content) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return content; // nothing here is relative to this page
  }
  if (!LINKS.has(url.protocol)) return content;
  return [
    h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, ...content),
  ];
}

/** Character references in text, as Markdown has them. */
function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]{2,8}));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name.toLowerCase()] ?? whole;
    const point = decimal ? Number(decimal) : parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : "\ufffd";
  });
}
