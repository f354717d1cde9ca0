// Draws the figures, which stand in the page as JSON, and lets arrow keys read them.
"use strict";
const status = document.querySelector("[role=status]");

for (const chart of document.querySelectorAll(".chart")) {
  const { data, layout } = JSON.parse(chart.dataset.figure);
  // A finger that moves over a chart scrolls the page; a mouse zooms in.
  layout.dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
  Plotly.newPlot(chart, data, layout, { displayModeBar: false, responsive: true });
  if (chart.tabIndex === 0) followKeys(chart);
}

function followKeys(chart) {
  const steps = chart.calcdata.flatMap((points) => points.map(({ x }) => x));
  const [low, high] = [Math.min(...steps), Math.max(...steps)];
  let current = high + 1;

  // Moves by a fiftieth, on to the next point where they lie further apart.
  const move = (way) => {
    const ahead = steps.filter((step) => way * (step - current) > 0);
    const far = ahead.filter((step) => way * (step - current) >= (high - low) / 50);
    if (ahead.length === 0) return;
    current = (way > 0 ? Math.min : Math.max)(...(far.length > 0 ? far : ahead));
    Plotly.Fx.hover(chart, { xval: current }, "xy");
    const texts = [...chart.querySelectorAll(".hoverlayer text")];
    status.textContent = texts.map((text) => text.textContent).join("; ");
  };

  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") Plotly.Fx.unhover(chart);
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (way === undefined) return;
    event.preventDefault();
    move(way);
  });
  chart.addEventListener("blur", () => Plotly.Fx.unhover(chart));
}
