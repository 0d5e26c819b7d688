// The peak of each model at each precision as bars, limits as dashed lines; the table holds every
// device's answer to the bar that the pointer was on last.

const ROW = 25, BOTTOM = 48, LABEL_OFFSET = 20, TILT = -55;
const [SIN, COS] = [Math.sin, Math.cos].map((of) => of((-TILT * Math.PI) / 180));

const quants = distinct(plan.bars.map((bar) => bar.quant));
const shown = switchesFor(quants, draw);
let chosen = 0;

function draw() {
  const width = clear();
  const bars = plan.bars.filter((bar) => shown.has(bar.quant));
  const groups = distinct(bars.map((bar) => bar.model)).map((model) =>
    bars.filter((bar) => bar.model === model));
  const highest = Math.max(...bars.map((bar) => bar.peakBytes));
  const [limits] = splitLimits(highest);
  const end = 1.02 * Math.max(highest, ...limits.map((limit) => limit.usableBytes));
  const left = widest(quants) + 14;
  const names = widest(limits.map((limit) => limit.name));
  const right = width - Math.max(widest(bars.map((bar) => bar.text)), COS * names) - 12;
  const top = LABEL_OFFSET + SIN * names + 14;
  const bottom = top + ROW * (bars.length + groups.length) + 8;
  const xOf = (bytes) => left + (bytes / end) * (right - left);
  drawing.setAttribute("viewBox", `0 0 ${width} ${bottom + BOTTOM}`);

  drawAxis(end, xOf, top, bottom);
  drawLimits(limits, xOf, top, bottom, left, right);
  const elements = drawGroups(groups, xOf, top, left);
  const choose = (number) => {
    elements[chosen]?.classList.remove("chosen");
    chosen = Math.min(Math.max(number, 0), bars.length - 1);
    elements[chosen].classList.add("chosen");
    answer(bars[chosen]);
  };
  elements.forEach((element, number) => (element.onpointerenter = () => choose(number)));
  drawing.onkeydown = (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step) { event.preventDefault(); choose(chosen + step); }
  };
  choose(chosen);
}

function drawAxis(end, xOf, top, bottom) {
  for (const value of niceTicks(end / GIB)) {
    const x = xOf(value * GIB);
    line(x, top, x, bottom, { class: "grid" });
    add("text", { x, y: bottom + 18, "text-anchor": "middle", class: "axis" }, tokens(value));
  }
  const middle = (xOf(0) + xOf(end)) / 2;
  add("text", { x: middle, y: bottom + 40, "text-anchor": "middle", class: "axis" }, plan.axis);
}

function drawLimits(limits, xOf, top, bottom, left, right) {
  const ends = limits.map((limit) => xOf(limit.usableBytes));
  const places = spread(ends, LABEL_GAP, left, right);
  limits.forEach(({ name }, number) => {
    const [x, place, y] = [ends[number], places[number], top - LABEL_OFFSET];
    line(x, top, x, bottom, { class: "limit pale" });
    line(x, top - 2, place, y + 4, { stroke: "var(--dash)", class: "lead" });
    add("text", { x: place, y, transform: `rotate(${TILT} ${place} ${y})` }, name);
  });
}

/** The bars' elements, from the top down. */
function drawGroups(groups, xOf, top, left) {
  let y = top;
  const elements = [];
  for (const group of groups) {
    add("text", { x: left + 4, y: y + 18, class: "strong halo" }, group[0].name);
    y += ROW;
    for (const bar of group) {
      const fill = colour(quants.indexOf(bar.quant));
      const shape = { x: left, y: y + 4, width: xOf(bar.peakBytes) - left, height: ROW - 8, fill };
      add("text", { x: left - 8, y: y + 17, "text-anchor": "end", class: "axis" }, bar.quant);
      elements.push(add("rect", { ...shape, class: "bar" }));
      add("text", { x: xOf(bar.peakBytes) + 6, y: y + 17, class: "halo" }, bar.text);
      y += ROW;
    }
  }
  return elements;
}

function answer(bar) {
  const number = (text) => ({ text, class: "number" });
  fillTable(
    `${bar.name} at ${bar.quant}: ${gib(bar.peakBytes)} GiB at the peak`,
    ["device", number("usable GiB"), number("left"), "fits", number("longest context")],
    bar.answers.map(({ device, usableBytes, verdict, longest }) => [
      device,
      number(gib(usableBytes)),
      number(gib(usableBytes - bar.peakBytes)),
      { text: `${SIGNS[verdict]} ${verdict}`, class: verdict },
      number(longest === null ? "any" : longest ? tokens(longest) : "-"),
    ]),
  );
}

window.addEventListener("resize", draw);
draw();
