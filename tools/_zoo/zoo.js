"use strict";
(() => {
  const table = document.getElementById("zoo"), body = table.tBodies[0], rows = [...body.rows];
  const controls = document.getElementById("controls"), plot = document.getElementById("plot");
  const group = document.getElementById("group"), cost = document.getElementById("cost");
  const readout = document.getElementById("readout"), count = document.getElementById("count");
  const COSTS = { params: "M parameters", macs: "G MACs", size: "MB", latency: "ms" };
  const number = (row, key) => row.dataset[key] === "" ? null : Number(row.dataset[key]);
  let shown = rows;

  const inside = row => {
    const { word, task, data, size, origin, commercial } = Object.fromEntries(new FormData(controls));
    const text = Object.values(row.dataset).join(" ").toLowerCase();
    return word.toLowerCase().split(/\s+/).every(part => text.includes(part))
      && (!task || row.dataset.task === task) && (!data || row.dataset.data === data)
      && (!size || number(row, "size") <= Number(size)) && (!origin || row.dataset.origin === origin)
      && (!commercial || row.dataset.free === "1");
  };

  const filter = () => {
    shown = rows.filter(inside);
    for (const row of rows) row.hidden = !shown.includes(row);
    count.textContent = shown.length === rows.length ? `${rows.length} models and forms of them`
      : `${shown.length} of ${rows.length} models and forms of them`;
    draw();
  };

  const sort = (head, descending) => {
    const { key, kind } = head.dataset;
    const value = row => kind === "num" ? number(row, key) : row.dataset[key].toLowerCase();
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);  // what is not known comes last either way
      return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
    });
    body.append(...rows);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  };

  // Plot ---------------------------------------------------------------------------------------------------------------
  const ns = "http://www.w3.org/2000/svg";
  const make = (name, attributes, text) => {
    const node = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  const front = points => {  // no other point costs less and is as accurate
    let best = -Infinity;
    return [...points].sort((a, b) => a.x - b.x || b.y - a.y).filter(point => point.y > best && ((best = point.y), true));
  };

  const logTicks = (low, high) => {
    const steps = high / low > 2000 ? [1] : high / low > 15 ? [1, 3] : [1, 2, 5], found = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
      for (const step of steps) found.push(step * 10 ** decade);
    return found.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
  };

  const linearTicks = (low, high) => {
    const rough = (high - low) / 5, decade = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(each => each * decade).find(each => each >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9; tick += step) found.push(Number(tick.toFixed(6)));
    return found;
  };

  const tell = point => {
    const known = ["params", "macs", "size", "latency"].filter(key => number(point.row, key) !== null)
      .map(key => `${Number(number(point.row, key).toPrecision(3))} ${COSTS[key]}`);
    readout.replaceChildren();
    const link = document.createElement("a");
    link.href = `#${point.row.dataset.name.split("@")[0]}`;
    link.textContent = point.row.dataset.name;
    readout.append(link, `: ${point.y.toFixed(1)} % ${point.row.dataset.label}, ${known.join(", ")}`);
    for (const dot of plot.querySelectorAll(".chosen")) dot.classList.remove("chosen");
    point.node.classList.add("chosen");
  };

  const draw = () => {
    const [data, label] = group.value.split("|"), holder = document.getElementById("svg");
    const points = shown.filter(row => row.dataset.data === data && row.dataset.label === label)
      .map(row => ({ row, x: number(row, cost.value), y: number(row, "value") }))
      .filter(point => point.x !== null && point.x > 0 && point.y !== null);
    holder.replaceChildren();
    readout.textContent = "";
    if (!points.length) {
      readout.textContent = `No model of this choice has both figures on ${data}.`;
      return;
    }
    const width = Math.max(300, Math.min(1100, holder.clientWidth)), height = width < 560 ? 300 : 380;
    const [left, right, top, bottom] = [44, 18, 14, 42];
    const xs = points.map(point => point.x), ys = points.map(point => point.y);
    let [xLow, xHigh, yLow, yHigh] = [Math.min(...xs) / 1.3, Math.max(...xs) * 1.3, Math.min(...ys), Math.max(...ys)];
    const margin = Math.max((yHigh - yLow) * 0.08, 0.5);
    [yLow, yHigh] = [Math.max(0, yLow - margin), Math.min(100, yHigh + margin)];
    const X = x => left + (width - left - right) * Math.log(x / xLow) / Math.log(xHigh / xLow);
    const Y = y => top + (height - top - bottom) * (yHigh - y) / (yHigh - yLow);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group",
      "aria-label": `${label} on ${data} against ${COSTS[cost.value]}, ${points.length} points` });
    for (const tick of linearTicks(yLow, yHigh)) {
      svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: Y(tick), y2: Y(tick) }));
      svg.append(make("text", { x: left - 8, y: Y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    for (const tick of logTicks(xLow, xHigh)) {
      svg.append(make("line", { class: "grid", x1: X(tick), x2: X(tick), y1: top, y2: height - bottom }));
      svg.append(make("text", { x: X(tick), y: height - bottom + 18, "text-anchor": "middle" }, String(Number(tick.toPrecision(3)))));
    }
    svg.append(make("text", { x: left, y: height - 6 }, `${cost.selectedOptions[0].textContent} (log scale)`));
    svg.append(make("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `up: ${label}, %`));
    const best = front(points);
    svg.append(make("path", { class: "front", d: best.map((p, i) => i ? `H${X(p.x)}V${Y(p.y)}` : `M${X(p.x)},${Y(p.y)}`).join("") }));
    for (const point of points) {
      const { origin, name } = point.row.dataset, classes = ["dot", origin, best.includes(point) ? "best" : ""];
      point.node = make("circle", { class: classes.join(" ").trim(), cx: X(point.x), cy: Y(point.y), r: 5, tabindex: 0,
        role: "button", "aria-label": `${name}: ${point.y.toFixed(1)} % ${label}, ${point.x} ${COSTS[cost.value]}` });
      point.node.append(make("title", {}, name));
      for (const event of ["pointerenter", "focus", "click"]) point.node.addEventListener(event, () => tell(point));
      svg.append(point.node);
    }
    if (width >= 560) names(svg, best, X, Y, width - right, points.map(point => [X(point.x), Y(point.y)]));
    holder.append(svg);
    readout.textContent = "Point at a mark, or tap it, to see which model it is.";
  };

  const names = (svg, best, X, Y, edge, dots) => {  // of the front, where there is room for them
    const taken = [];
    for (const point of best) {
      const text = point.row.dataset.name.replace(/^torchvision_/, "").split(".")[0] + (point.row.dataset.name.match(/@.*/) || [""])[0];
      const span = text.length * 6.4 + 6, [x, y] = [X(point.x), Y(point.y)];
      const spots = [[x - 9 - span, y - 15], [x + 9, y + 4], [x - span / 2, y - 24], [x - span / 2, y + 9]];
      const free = spots.find(([a, b]) => a > 46 && a + span < edge && b > 0
        && !taken.some(([c, d, s]) => a < c + s && c < a + span && Math.abs(b - d) < 15)
        && !dots.some(([c, d]) => c > a - 5 && c < a + span + 5 && d > b - 4 && d < b + 19 && (c !== x || d !== y)));
      if (!free) continue;
      taken.push([...free, span]);
      svg.append(make("text", { class: "name", x: free[0], y: free[1] + 12 }, text));
    }
  };

  const open = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (card instanceof HTMLDetailsElement) { card.open = true; card.scrollIntoView(); }
  };

  controls.hidden = plot.hidden = false;
  controls.addEventListener("input", filter);
  controls.addEventListener("submit", event => event.preventDefault());
  for (const select of [group, cost]) select.addEventListener("input", draw);
  for (const head of table.tHead.rows[0].cells)
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), first = head.dataset.key === "value" ? "descending" : "ascending";
      sort(head, now === null ? first === "descending" : now === "ascending");
    });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  addEventListener("hashchange", open);
  filter();
  open();
})();
