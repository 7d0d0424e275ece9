// Make elements. Data only ever becomes text or an attribute, never markup.
const NS = "http://www.w3.org/2000/svg";

function fill(made, properties, children) {
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, text] of Object.entries(value)) made.style.setProperty(name, text);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// h("p", {class: "lead", onclick: act, style: {"--hue": 20}}, "text", element, [more]): an HTML element.
export function h(name, properties, ...children) {
  return fill(document.createElement(name), properties, children);
}

// The same for SVG.
export function s(name, properties, ...children) {
  return fill(document.createElementNS(NS, name), properties, children);
}

// Set text only where it differs: nothing to lay out again, nothing said twice by a screen reader.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
