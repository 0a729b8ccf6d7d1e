// The two sides: beside the centre where there is room, over it where there is not.

import { byId } from "../common/dom.js";
import { preferences } from "../common/preferences.js";

const NARROW = matchMedia("(max-width: 48rem)"); // as chat.css has them
const MEDIUM = matchMedia("(max-width: 62rem)");

export class Layout {
  #layout = byId("layout");
  #sidebar = false;
  #panel = false;

  /** @param {(open: boolean) => void} panelChanged */
  constructor(panelChanged) {
    this.panelChanged = panelChanged;
    byId("open-sidebar").addEventListener("click", () => this.toggleSidebar());
    byId("close-sidebar").addEventListener("click", () => {
      this.toggleSidebar();
      byId("open-sidebar").focus();
    });
    byId("toggle-panel").addEventListener("click", () => this.#showPanel(!this.#panel, { remember: true }));
    byId("close-panel").addEventListener("click", () => {
      this.#showPanel(false, { remember: true });
      byId("toggle-panel").focus();
    });
    byId("scrim").addEventListener("click", () => this.#showSidebar(false));
    NARROW.addEventListener("change", () => this.restore());
    MEDIUM.addEventListener("change", () => this.restore());
  }

  /** As it was last time, or as the width suggests. */
  restore() {
    this.#showSidebar(!NARROW.matches && preferences.get("sidebar") !== false);
    this.#showPanel(!MEDIUM.matches && preferences.get("panel") !== false);
    this.#layout.hidden = false; // What was not shown before does not slide to where it is now.
  }

  toggleSidebar() {
    this.#showSidebar(!this.#sidebar, { remember: !NARROW.matches });
    if (this.#sidebar) byId("close-sidebar").focus();
  }

  /** Where it lies over the centre, it goes away once something was chosen. */
  leaveSidebar() {
    if (NARROW.matches) this.#showSidebar(false);
  }

  #showSidebar(open, { remember = false } = {}) {
    this.#sidebar = open;
    this.#layout.classList.toggle("with-sidebar", open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    byId("scrim").hidden = !(open && NARROW.matches);
    if (remember) preferences.set("sidebar", open);
  }

  #showPanel(open, { remember = false } = {}) {
    this.#panel = open;
    this.#layout.classList.toggle("with-panel", open);
    byId("panel").hidden = !open;
    byId("toggle-panel").setAttribute("aria-expanded", String(open));
    if (remember && !MEDIUM.matches) preferences.set("panel", open);
    this.panelChanged(open);
  }
}
