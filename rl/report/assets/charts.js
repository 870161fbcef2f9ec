// Draws the figures of rl/report/figures.py: curves with error bars, stacked areas, heat maps. One cursor for the
// pointer and the arrow keys; the legend hides and shows curves; "Values" holds the same as a table.
const HEIGHT = 190, TOP = 8, RIGHT = 12, BOTTOM = 22;

for (const holder of document.querySelectorAll("figure[data-figure]")) mount(holder, DATA.figures[holder.dataset.figure]);

function mount(holder, figure) {
  const hidden = new Set();
  const plot = element("div", { class: "plot", role: "img", tabindex: "0", "aria-label": described(figure) });
  const tip = element("div", { class: "tip", role: "status" });
  tip.hidden = true;
  holder.append(plot, tip);
  if (figure.kind === "heat") holder.append(heatScale(figure));
  else if (figure.series.length > 1) holder.append(legend(figure, hidden, () => redraw()));
  holder.append(valuesTable(figure));

  let chart = null, place = null; // where the cursor is
  function redraw() {
    chart = (figure.kind === "heat" ? heatMap : curves)(figure, hidden, Math.max(200, plot.clientWidth));
    plot.replaceChildren(chart.svg);
    if (place !== null) show(place);
  }
  function show(at) {
    place = at;
    const { title, rows, x } = chart.mark(at);
    tip.replaceChildren(element("strong", {}, title), element("ul", {}, ...rows));
    tip.hidden = false;
    const room = holder.clientWidth - tip.offsetWidth - 8;
    const right = plot.offsetLeft + x + 14;
    tip.style.left = `${Math.max(8, right <= room ? right : Math.min(room, plot.offsetLeft + x - tip.offsetWidth - 14))}px`;
  }
  function hide() {
    place = null;
    tip.hidden = true;
    chart.mark(null);
  }
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(chart.nearest(event.clientX - box.left, event.clientY - box.top));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const to = chart.moved(event.key, place);
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  new ResizeObserver(() => redraw()).observe(plot);
}

function described(figure) {
  if (figure.kind === "heat") return `${figure.title}: heat map of ${figure.series.length} layers. Arrow keys read cells.`;
  const ends = figure.series.slice(0, 8).map((s) => `${s.name} ${shown(last(s.y), figure.unit)}`);
  return `${figure.title}, ${figure.x.length} points; at the end: ${ends.join(", ")}. Arrow keys read values.`;
}

function last(values) {
  return values.filter((value) => value !== null).at(-1);
}

function colour(name, index) {
  return ["correct", "wrong", "unparsed", "timeout"].includes(name) ? name : `c${index % 8}`;
}

function legend(figure, hidden, changed) {
  const items = figure.series.map((series, i) => {
    const swatch = element("span", { class: `swatch ${colour(series.name, i)}` });
    const button = element("button", { type: "button", "aria-pressed": "true" }, swatch, series.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      changed();
    });
    return element("li", {}, button);
  });
  return element("ul", { class: "legend", "aria-label": `Curves of ${figure.title}` }, ...items);
}

// ---- curves and stacked areas ---------------------------------------------------------------------

function curves(figure, hidden, width) {
  const seen = figure.series.map((series, i) => ({ ...series, i })).filter(({ i }) => !hidden.has(i));
  const layers = figure.kind === "stack" ? stacked(seen) : null;
  const scale = verticalScale(figure, seen, layers);
  const labels = scale.ticks.map((tick) => shown(tick, figure.unit, 7)); // ticks near 1.00002 must differ
  const left = 10 + 6.6 * Math.max(...labels.map((text) => text.length));
  const { x } = figure;
  const span = x.at(-1) - x[0];
  const X = (i) => (span ? left + ((x[i] - x[0]) / span) * (width - left - RIGHT) : (left + width - RIGHT) / 2);
  const Y = (value) => TOP + (1 - scale.at(value)) * (HEIGHT - TOP - BOTTOM);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT });
  scale.ticks.forEach((tick, n) => {
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - RIGHT, y1: Y(tick), y2: Y(tick) }));
    svg.append(drawn("text", { x: left - 6, y: Y(tick) + 4, "text-anchor": "end" }, labels[n]));
  });
  for (const tick of span ? wholeTicks(x[0], x.at(-1), Math.floor((width - left) / 70)) : [x[0]]) {
    const at = span ? left + ((tick - x[0]) / span) * (width - left - RIGHT) : X(0);
    if (at < left + 48) continue; // here stands the name of the axis
    const anchor = at > width - RIGHT - 12 ? "end" : "middle";
    svg.append(drawn("text", { x: at, y: HEIGHT - 5, "text-anchor": anchor }, String(tick)));
  }
  svg.append(drawn("text", { x: left, y: HEIGHT - 5 }, figure.x_label));
  if (layers) layers.forEach((layer) => svg.append(area(layer, x, X, Y)));
  else seen.forEach((series) => svg.append(curve(figure, series, X, Y, scale.shows)));

  const cursor = drawn("g", {});
  svg.append(cursor);
  return {
    svg,
    nearest: (atX) => x.reduce((best, _, i) => (Math.abs(X(i) - atX) < Math.abs(X(best) - atX) ? i : best), 0),
    moved(key, from) {
      const to = { ArrowLeft: (from ?? x.length) - 1, ArrowRight: (from ?? -1) + 1, Home: 0, End: x.length - 1 }[key];
      return to === undefined ? to : Math.min(x.length - 1, Math.max(0, to));
    },
    mark(at) {
      cursor.replaceChildren();
      if (at === null) return null;
      cursor.append(drawn("line", { class: "cursor", x1: X(at), x2: X(at), y1: TOP, y2: HEIGHT - BOTTOM }));
      for (const { y, name, i } of layers ? [] : seen) {
        if (scale.shows(y[at])) cursor.append(drawn("circle", { class: `dot ${colour(name, i)}`, cx: X(at), cy: Y(y[at]), r: 3.5 }));
      }
      const rows = seen.map(({ name, y, error, i }) => {
        const range = error && error[at] !== null ? ` ± ${shown(error[at], figure.unit)}` : "";
        const swatch = element("span", { class: `swatch ${colour(name, i)}` });
        return element("li", {}, swatch, `${name} ${shown(y[at], figure.unit)}${range}`);
      });
      return { title: `${figure.x_label} ${x[at]}`, rows, x: X(at) };
    },
  };
}

function curve(figure, { name, y, error, i }, X, Y, shows) {
  const group = drawn("g", { class: colour(name, i) });
  let path = "";
  y.forEach((value, at) => {
    if (!shows(value)) return;
    const begins = at === 0 || !shows(y[at - 1]);
    const ends = at === y.length - 1 || !shows(y[at + 1]);
    path += `${begins ? "M" : "L"}${X(at).toFixed(1)} ${Y(value).toFixed(1)}`;
    if ((begins && ends) || y.length <= 30) group.append(drawn("circle", { class: "dot", cx: X(at), cy: Y(value), r: 2.4 }));
    if (error && error[at]) {
      const [low, high] = between(figure, value, error[at]).map(Y);
      group.append(drawn("path", { class: "bar", d: `M${X(at)} ${low}V${high}M${X(at) - 3} ${low}h6M${X(at) - 3} ${high}h6` }));
    }
  });
  group.append(drawn("path", { class: "curve", d: path }));
  return group;
}

// Where an error bar begins and ends: a share stays one.
function between(figure, value, error) {
  const ends = [value - error, value + error];
  return figure.unit === "share" ? [Math.max(0, ends[0]), Math.min(1, ends[1])] : ends;
}

function stacked(seen) {
  let floor = null;
  return seen.map(({ name, y, i }) => {
    const low = floor ?? y.map(() => 0);
    floor = y.map((value, at) => low[at] + (value ?? 0));
    return { name, i, low, high: floor };
  });
}

function area({ name, i, low, high }, x, X, Y) {
  const half = x.length > 1 ? 0 : 20; // a single point is drawn as a bar
  const over = high.map((value, at) => `${X(at) - half} ${Y(value)}${half ? `h${2 * half}` : ""}`);
  const under = low.map((value, at) => `${X(at) + half} ${Y(value)}${half ? `h${-2 * half}` : ""}`).reverse();
  return drawn("path", { class: `area ${colour(name, i)}`, d: `M${over.join("L")}L${under.join("L")}Z` });
}

// Where a value stands between the lower (0) and the upper edge (1), which values can be drawn, and the ticks.
function verticalScale(figure, seen, layers) {
  const shows = (value) => value !== null && (!figure.log || value > 0);
  const values = layers
    ? [0, ...layers.flatMap((layer) => layer.high)]
    : seen.flatMap(({ y, error }) => y.flatMap((v, i) => (shows(v) ? between(figure, v, error?.[i] ?? 0) : [])));
  if (!values.length) return { shows, at: () => 0.5, ticks: [0] };
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (figure.log) {
    low = Math.floor(Math.log10(low));
    high = Math.max(low + 1, Math.ceil(Math.log10(high)));
    const step = Math.ceil((high - low) / 5);
    const ticks = [];
    for (let power = low; power <= high; power += step) ticks.push(10 ** power);
    return { shows, at: (value) => (Math.log10(value) - low) / (high - low), ticks };
  }
  if (figure.unit !== "number" || (low >= 0 && low < 0.6 * high)) low = Math.min(0, low);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const step = niceStep((high - low) / 4);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  const ticks = [];
  for (let n = 0; n <= Math.round((high - low) / step); n++) ticks.push(+(low + n * step).toPrecision(12));
  return { shows, at: (value) => (value - low) / (high - low), ticks };
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9));
}

function wholeTicks(first, end, count) {
  const step = Math.max(1, niceStep((end - first) / Math.max(1, count)));
  const ticks = [];
  for (let tick = Math.ceil(first / step) * step; tick <= end; tick += step) ticks.push(tick);
  return ticks;
}

// ---- heat maps ------------------------------------------------------------------------------------

function heatRange(figure) {
  const values = figure.series.flatMap(({ y }) => y.filter((value) => value !== null));
  return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
}

function heatScale(figure) {
  const [low, high] = heatRange(figure);
  return element("p", { class: "ramp" }, shown(low, figure.unit), element("span"), shown(high, figure.unit));
}

function heatMap(figure, _, width) {
  const { x, series } = figure;
  const [low, high] = heatRange(figure);
  const left = 10 + 6.6 * Math.max(...series.map(({ name }) => name.length));
  const rowHeight = Math.min(22, Math.max(5, 170 / series.length)), across = (width - left - RIGHT) / x.length;
  const height = TOP + rowHeight * series.length + BOTTOM;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height });
  const named = Math.ceil(14 / rowHeight);
  series.forEach(({ name, y }, row) => {
    const at = TOP + row * rowHeight;
    if (row % named === 0) svg.append(drawn("text", { x: left - 6, y: at + rowHeight / 2 + 4, "text-anchor": "end" }, name));
    y.forEach((value, i) => {
      if (value === null) return;
      const strength = high > low ? 0.06 + 0.94 * ((value - low) / (high - low)) : 0.5;
      const place = { x: left + i * across, y: at, width: Math.max(0.5, across - (across > 4 ? 1 : 0)), height: rowHeight - (rowHeight > 7 ? 1 : 0) };
      svg.append(drawn("rect", { class: "cell", ...place, "fill-opacity": strength.toFixed(3) }));
    });
  });
  for (const i of wholeTicks(0, x.length - 1, Math.floor((width - left) / 70))) {
    svg.append(drawn("text", { x: left + (i + 0.5) * across, y: height - 5, "text-anchor": "middle" }, String(x[i])));
  }
  const frame = drawn("rect", { class: "frame", width: across, height: rowHeight });
  const within = (row, i) => [Math.min(series.length - 1, Math.max(0, row)), Math.min(x.length - 1, Math.max(0, i))];
  return {
    svg,
    nearest: (atX, atY) => within(Math.floor((atY - TOP) / rowHeight), Math.floor((atX - left) / across)),
    moved(key, from) {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
      return by && (from ? within(from[0] + by[0], from[1] + by[1]) : [0, 0]);
    },
    mark(at) {
      frame.remove();
      if (at === null) return null;
      const [row, i] = at;
      frame.setAttribute("x", left + i * across);
      frame.setAttribute("y", TOP + row * rowHeight);
      svg.append(frame);
      const value = shown(series[row].y[i] ?? null, figure.unit);
      return { title: `${series[row].name}, ${figure.x_label} ${x[i]}`, rows: [element("li", {}, value)], x: left + i * across };
    },
  };
}

// ---- the same as a table --------------------------------------------------------------------------

function valuesTable(figure) {
  const details = element("details", { class: "values" }, element("summary", {}, "Values"));
  details.addEventListener("toggle", () => {
    if (details.childElementCount > 1) return; // made when first opened: there may be thousands of cells
    const heads = [figure.x_label, ...figure.series.map(({ name }) => name)].map((name) => element("th", { scope: "col" }, name));
    const rows = figure.x.map((step, at) => {
      const cells = figure.series.map(({ y, error }) => {
        const range = error && error[at] !== null ? ` ± ${shown(error[at], figure.unit)}` : "";
        return element("td", {}, shown(y[at], figure.unit) + range);
      });
      return element("tr", {}, element("th", { scope: "row" }, String(step)), ...cells);
    });
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
    details.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Values of ${figure.title}` }, table));
  });
  return details;
}
