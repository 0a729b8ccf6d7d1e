"""Checks of a page's accessibility, to be run in it: each gives a list of what is wrong."""

NAMELESS = """() => {
  const nameOf = (element) => {
    const ids = element.getAttribute("aria-labelledby")?.split(" ") ?? [];
    const labels = [...(element.labels ?? [])].map((label) => label.textContent);
    const own = ["INPUT", "SELECT", "TEXTAREA"].includes(element.tagName) ? "" : element.textContent;
    const labelled = ids.map((id) => document.getElementById(id)?.textContent ?? "").join("");
    return element.getAttribute("aria-label") || labelled || labels.join("") || own;
  };
  const named = "button, a, input, select, textarea, img, dialog, [role=group], svg:not([aria-hidden])";
  return [...document.querySelectorAll(named)]
    .filter((element) => element.checkVisibility({ visibilityProperty: true }))
    .filter((element) => (element.tagName === "IMG" ? !element.hasAttribute("alt") : nameOf(element).trim() === ""))
    .map((element) => element.outerHTML.slice(0, 200));
}"""
"""Controls and pictures without a name."""

LOW_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, index) => value * a + under[index] * (1 - a));
  const ground = (element) => {
    const chain = [];
    for (let one = element; one; one = one.parentElement) chain.unshift(rgba(getComputedStyle(one).backgroundColor));
    return chain.reduce((under, colour) => over(colour, under), [255, 255, 255]);
  };
  const luminance = (rgb) => rgb
    .map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "");
    const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!hasText || !seen || element.closest("[disabled], .visually-hidden, .skip")) continue;
    const style = getComputedStyle(element);
    const under = ground(element);
    const ink = over(rgba(element instanceof SVGElement ? style.fill : style.color), under);
    const [light, dark] = [luminance(ink), luminance(under)].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`;
    if (contrast < (large ? 3 : 4.5)) found.push(`${contrast.toFixed(2)} ${name}`);
  }
  return found;
}"""
"""Texts whose contrast is below WCAG's AA."""
