"use strict";
// What both other scripts need. Completions are untrusted: strings enter the page as text nodes and attribute values,
// never as markup.
const DATA = JSON.parse(document.getElementById("report-data").textContent);

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A number as a person reads it, rounded to so many digits; "–" for none.
function shown(value, unit, digits = unit === "share" ? 3 : 4) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${+(100 * value).toPrecision(digits)} %`;
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e") : String(+value.toPrecision(digits));
  return unit === "seconds" ? `${text} s` : text;
}
