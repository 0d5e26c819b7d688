// Memory against context: one curve and band per precision, limits as dashed lines; the pointer
// or the arrow keys move a cursor whose values stand in the table.

const HEIGHT = 430, LEFT = 52, TOP = 26, BOTTOM = 48, LABEL_OFFSET = 26;

const { contexts } = plan;
const first = Math.log2(contexts[0]);
const octaves = Math.max(Math.log2(contexts.at(-1)) - first, 1e-9);
const shown = switchesFor(plan.precisions.map((curve) => curve.quant), draw);
let chosen = contexts.indexOf(plan.asked);
let width = 0;
let right = 0;
let cursor = [];

const xOf = (context) => LEFT + ((Math.log2(context) - first) / octaves) * (right - LEFT);

function draw() {
  width = clear();
  const curves = plan.precisions
    .map((curve, number) => ({ ...curve, colour: colour(number) }))
    .filter((curve) => shown.has(curve.quant));
  const highest = Math.max(...curves.map((curve) => curve.highBytes.at(-1)));
  const [limits, beyond] = splitLimits(highest);
  const top = 1.05 * Math.max(highest, ...limits.map((limit) => limit.usableBytes));
  const labels = [
    ...curves.map(({ quant, peakBytes, colour }) => ({ text: quant, bytes: peakBytes.at(-1), colour })),
    ...limits.map(({ text, usableBytes }) => ({ text, bytes: usableBytes, colour: "var(--dash)" })),
    ...beyond.reverse().map(({ text }) => ({ text: `↑ ${text}`, bytes: top, colour: "var(--dash)", isBeyond: true })),
  ];
  const bottom = TOP + Math.max(HEIGHT, LABEL_GAP * (labels.length + 1));
  const yOf = (bytes) => bottom - (bytes / top) * (bottom - TOP);
  right = width - LABEL_OFFSET - widest(labels.map((label) => label.text)) - 4;
  drawing.setAttribute("viewBox", `0 0 ${width} ${bottom + BOTTOM}`);

  drawAxes(top, yOf, bottom);
  for (const { usableBytes } of limits) {
    line(LEFT, yOf(usableBytes), right, yOf(usableBytes), { class: "limit" });
  }
  for (const curve of curves) drawCurve(curve, yOf);
  drawLabels(labels, yOf, bottom);
  cursor = [
    line(0, TOP, 0, bottom, { class: "cursor" }),
    add("text", { y: TOP - 8, "text-anchor": "middle", class: "strong" }),
    ...curves.map((curve) => add("circle", { r: 4.5, fill: curve.colour })),
  ];
  choose(chosen, curves, yOf);
  const moveTo = (index) => choose(Math.min(Math.max(index, 0), contexts.length - 1), curves, yOf);
  drawing.onpointermove = drawing.onpointerdown = (event) => moveTo(nearest(event));
  drawing.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); moveTo(chosen + step); }
  };
}

function drawAxes(top, yOf, bottom) {
  for (const value of niceTicks(top / GIB)) {
    const y = yOf(value * GIB);
    line(LEFT, y, right, y, { class: "grid" });
    add("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end", class: "axis" }, tokens(value));
  }
  for (const [context, text] of plan.ticks) {
    line(xOf(context), TOP, xOf(context), bottom, { class: "grid" });
    add("text", { x: xOf(context), y: bottom + 18, "text-anchor": "middle", class: "axis" }, text);
  }
  add("text", { x: LEFT - 8, y: TOP - 8, "text-anchor": "end", class: "axis" }, "GiB");
  add("text", { x: LEFT, y: bottom + 40, class: "axis" }, plan.axis);
}

function drawCurve(curve, yOf) {
  const path = (bytes) => bytes.map((value, index) => `${xOf(contexts[index])},${yOf(value)}`);
  const outline = [...path(curve.highBytes), ...path(curve.lowBytes).reverse()];
  add("polygon", { points: outline.join(" "), fill: curve.colour, class: "band" });
  add("polyline", { points: path(curve.peakBytes).join(" "), stroke: curve.colour, class: "curve" });
  for (const [context, bytes] of curve.crossings) {
    const place = { cx: xOf(context), cy: yOf(bytes), r: 4.5 };
    add("circle", { ...place, stroke: curve.colour, class: "crossing" });
  }
}

function drawLabels(labels, yOf, bottom) {
  const ends = labels.map((label) => yOf(label.bytes));
  const places = spread(ends, LABEL_GAP, TOP, bottom);
  labels.forEach(({ text, colour, isBeyond }, index) => {
    const x = right + LABEL_OFFSET;
    const [y, place] = [ends[index], places[index]];
    if (!isBeyond) line(right + 3, y, x - 4, place, { stroke: colour, class: "lead" });
    add("text", { x, y: place + 4.5, style: `fill: ${colour}`, class: "strong" }, text);
  });
}

/** The index of the context nearest to the pointer. */
function nearest(event) {
  const box = drawing.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * width;
  const distances = contexts.map((context) => Math.abs(xOf(context) - x));
  return distances.indexOf(Math.min(...distances));
}

function choose(index, curves, yOf) {
  chosen = index;
  const x = xOf(contexts[index]);
  const [rule, text, ...dots] = cursor;
  rule.setAttribute("x1", x);
  rule.setAttribute("x2", x);
  text.setAttribute("x", Math.min(Math.max(x, LEFT + 45), right - 45));
  text.textContent = `${tokens(contexts[index])} tokens`;
  dots.forEach((dot, number) => {
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", yOf(curves[number].peakBytes[index]));
  });
  fillTable(
    `At ${tokens(contexts[index])} tokens`,
    [
      "precision",
      { text: "peak GiB", class: "number" },
      { text: "least to most", class: "number" },
      ...plan.limits.map((limit) => limit.text),
    ],
    curves.map((curve) => valuesAt(index, curve)),
  );
}

function valuesAt(index, curve) {
  const [peak, low, high] = [curve.peakBytes, curve.lowBytes, curve.highBytes].map((of) => of[index]);
  return [
    { text: curve.quant, colour: curve.colour },
    { text: gib(peak), class: "number" },
    { text: `${gib(low)}–${gib(high)}`, class: "number" },
    ...plan.limits.map(({ usableBytes }, number) => {
      const left = usableBytes - peak;
      const verdict = left < 0 ? "no" : left < plan.tightShare * usableBytes ? "tight" : "yes";
      const longest = curve.longest[number];
      const reach = longest === null ? "any context" : `up to ${tokens(longest)}`;
      return { text: longest === 0 ? SIGNS.no : `${SIGNS[verdict]} ${reach}`, class: verdict };
    }),
  ];
}

window.addEventListener("resize", draw);
draw();
