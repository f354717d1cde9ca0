// Says what lies under the pointer. The charts are whole without it.
"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  const numbers = (text) => (text ? text.split(",").map(Number) : []);
  const short = (value) => String(Number(value.toPrecision(4)));

  const make = (name, text = "", className = "") => {
    const made = document.createElement(name);
    made.textContent = text;
    made.className = className;
    return made;
  };

  const show = (x, y, ...content) => {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const room = 12;
    const { width, height } = tip.getBoundingClientRect();
    const right = x + room + width < innerWidth ? x + room : x - room - width;
    tip.style.left = `${Math.max(4, right)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + room, innerHeight - height - 4))}px`;
  };

  // Where a pointer is, in the units of the drawing.
  const placeIn = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };

  const nearest = (sorted, value) => {
    let low = 0;
    let high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle;
      else high = middle;
    }
    return Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
  };

  const seriesOf = (svg) =>
    [...svg.querySelectorAll("[data-x]")]
      .map((curve) => ({
        label: curve.dataset.label,
        style: curve.getAttribute("class"),
        isRaw: curve.classList.contains("raw"),
        x: numbers(curve.dataset.x),
        y: numbers(curve.dataset.y),
      }))
      .filter((one) => one.x.length > 0);

  // What the curves say at a step; a smoothed one has two numbers, and one row. Of a
  // thinned curve only extremes are left, which stand for no step but their own.
  const rowsAt = (series, step, reach) => {
    const rows = new Map();
    for (const one of series) {
      const index = nearest(one.x, step);
      if (Math.abs(one.x[index] - step) > (one.isRaw ? 0 : reach)) continue;
      const row = rows.get(one.label) ?? {};
      row[one.isRaw ? "raw" : "value"] = one.y[index];
      if (!one.isRaw) row.style ??= one.style;
      rows.set(one.label, row);
    }
    return rows;
  };

  const tableOf = (rows) => {
    const table = make("table");
    const hasRaw = [...rows.values()].some((row) => row.raw !== undefined);
    if (hasRaw) {
      const head = make("tr");
      head.append(make("th"), make("td", "mean"), make("td", "exact"));
      table.append(head);
    }
    for (const [label, { style, value, raw }] of rows) {
      const line = make("tr");
      const name = make("th", label);
      name.prepend(make("span", "", `swatch ${style ?? ""}`));
      line.append(name);
      for (const number of hasRaw ? [value, raw] : [value]) {
        line.append(make("td", number === undefined ? "" : short(number)));
      }
      table.append(line);
    }
    return table;
  };

  const followLines = (svg) => {
    const [low, high, left, right, top, bottom] = numbers(svg.dataset.range);
    const series = seriesOf(svg);
    if (series.length === 0) return;
    const cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    let current = high;

    const hide = () => {
      tip.hidden = true;
      cursor.remove();
    };

    const showAt = (wanted, clientX, clientY) => {
      const steps = series.map((one) => one.x[nearest(one.x, wanted)]);
      current = steps.reduce((a, b) =>
        Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a,
      );
      const x = left + ((current - low) / (high - low)) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      svg.append(cursor);
      const rows = rowsAt(series, current, 0.01 * (high - low));
      show(clientX, clientY, make("strong", `step ${current}`), tableOf(rows));
    };

    const point = (event) => {
      const share = (placeIn(svg, event)[0] - left) / (right - left);
      showAt(low + share * (high - low), event.clientX, event.clientY);
    };

    // Steps of a fiftieth, on to the next point where they lie further apart.
    const move = (way) => {
      const steps = series.flatMap((one) => one.x);
      const ahead = steps.filter((step) => way * (step - current) > 0);
      const far = ahead.filter((step) => way * (step - current) >= (high - low) / 50);
      const choose = way > 0 ? Math.min : Math.max;
      if (ahead.length === 0) return;
      const next = (far.length > 0 ? far : ahead).reduce((a, b) => choose(a, b));
      const box = svg.getBoundingClientRect();
      showAt(next, box.left, box.top);
    };

    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide();
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (way === undefined) return;
      event.preventDefault();
      move(way);
    });
  };

  const followCells = (svg) => {
    const edges = numbers(svg.dataset.edges);
    const loads = svg.dataset.loads.split(";").map(numbers);
    const [left, right, top, bottom] = numbers(svg.dataset.box);
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
    });
    const point = (event) => {
      const [x, y] = placeIn(svg, event);
      const column = Math.floor(((x - left) / (right - left)) * (edges.length - 1));
      const row = Math.floor(((y - top) / (bottom - top)) * loads.length);
      const load = loads[row]?.[column];
      if (load === undefined) {
        tip.hidden = true;
        return;
      }
      const [first, last] = [Math.ceil(edges[column]), Math.floor(edges[column + 1])];
      const steps = last > first ? `steps ${first} to ${last}` : `step ${first}`;
      const text = Number.isNaN(load) ? "no records" : `${load} × an even share`;
      show(event.clientX, event.clientY, make("strong", `E${row + 1}, ${steps}`), make("div", text));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
  };

  document.querySelectorAll(".chart").forEach(followLines);
  document.querySelectorAll(".heat").forEach(followCells);
})();
