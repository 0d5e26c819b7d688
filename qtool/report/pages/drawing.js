// What the drawings share. Sizes in pixels of the viewBox, memory in bytes.

const GIB = 2 ** 30;
const LEAST_WIDTH = 640;
const LABEL_GAP = 17;
const FARTHEST_LIMIT = 1.6; // limits further above what is drawn are named at the edge
const SIGNS = { yes: "✓", tight: "!", no: "✗" };

const plan = JSON.parse(document.getElementById("plan").textContent);
const drawing = document.getElementById("drawing");

const gib = (bytes, digits = 2) =>
  (bytes / GIB).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const tokens = (count) => count.toLocaleString("en");
const colour = (number) => `var(--colour-${number % plan.numColours})`;
const distinct = (values) => [...new Set(values)];

/** Empty the drawing; returns its width, which is the window's unless that is very narrow. */
function clear() {
  drawing.replaceChildren();
  return Math.max(drawing.clientWidth, LEAST_WIDTH);
}

/** Add an SVG element to the drawing. */
function add(name, attributes, text = "") {
  const element = document.createElementNS(drawing.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return drawing.appendChild(element);
}

function line(x1, y1, x2, y2, attributes) {
  return add("line", { x1, y1, x2, y2, ...attributes });
}

/** The width of the widest text. */
function widest(texts) {
  const probe = add("text", { visibility: "hidden", class: "strong" });
  const widths = texts.map((text) => ((probe.textContent = text), probe.getComputedTextLength()));
  probe.remove();
  return Math.max(0, ...widths);
}

/** Round numbers from 0 to `top`, some six of them. */
function niceTicks(top) {
  const rough = top / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  return Array.from({ length: Math.floor(top / step) + 1 }, (_, number) => number * step);
}

/** Places for labels: in the order of `wanted`, `gap` apart, each as near as can be. */
function spread(wanted, gap, low, high) {
  const order = wanted.map((_, index) => index).sort((a, b) => wanted[a] - wanted[b]);
  const pools = []; // neighbours out of order share a mean
  order.forEach((index, rank) => {
    let pool = { mean: wanted[index] - rank * gap, count: 1 };
    while (pools.length && pools.at(-1).mean > pool.mean) {
      const other = pools.pop();
      const count = pool.count + other.count;
      pool = { mean: (pool.mean * pool.count + other.mean * other.count) / count, count };
    }
    pools.push(pool);
  });
  const highest = Math.max(high - (wanted.length - 1) * gap, low);
  const levels = pools.flatMap(({ mean, count }) =>
    Array(count).fill(Math.min(Math.max(mean, low), highest)));
  const places = [];
  order.forEach((index, rank) => (places[index] = levels[rank] + rank * gap));
  return places;
}

function splitLimits(highest) {
  const isNear = (limit) => limit.usableBytes <= FARTHEST_LIMIT * highest;
  return [plan.limits.filter(isNear), plan.limits.filter((limit) => !isNear(limit))];
}

/** A box to tick for each precision; the last one left stays ticked. */
function switchesFor(quants, onChange) {
  const shown = new Set(quants);
  const form = document.getElementById("switches");
  quants.forEach((quant, number) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    label.style.color = box.style.accentColor = colour(number);
    label.append(box, quant);
    form.append(label);
    box.addEventListener("change", () => {
      if (box.checked) shown.add(quant);
      else if (shown.size > 1) shown.delete(quant);
      else box.checked = true;
      onChange();
    });
  });
  form.hidden = quants.length < 2;
  return shown;
}

/** Fill the table: cells are texts, or {text, class}. */
function fillTable(caption, head, rows) {
  const table = document.querySelector("#readout table");
  const row = (tag, cells) => {
    const line = document.createElement("tr");
    for (const cell of cells) {
      const element = document.createElement(tag);
      const { text, ...more } = typeof cell === "object" ? cell : { text: cell };
      element.textContent = text;
      element.className = more.class ?? "";
      element.style.color = more.colour ?? "";
      line.append(element);
    }
    return line;
  };
  table.caption.textContent = caption;
  table.tHead.replaceChildren(row("th", head));
  table.tBodies[0].replaceChildren(...rows.map((cells) => row("td", cells)));
}
