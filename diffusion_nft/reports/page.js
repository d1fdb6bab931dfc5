"use strict";
// Shows the values under the pointer, or under a cursor that the arrow keys move.
const tip = document.getElementById("tip");
const text = (value) => {
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return size >= 0.01 && size < 1e6 ? String(+value.toPrecision(4)) : value.toPrecision(3);
};

for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const { box: [left, top, right, bottom], range: [x0, x1], x: label, curves } = JSON.parse(chart.dataset.chart);
  const places = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  let at = -1;

  const nearest = (points, x, of) =>
    points.reduce((best, one) => (Math.abs(of(one) - x) < Math.abs(of(best) - x) ? one : best));

  function show(x) {
    at = places.indexOf(nearest(places, x, (place) => place));
    const place = places[at];
    const pixel = left + ((place - x0) / (x1 - x0)) * (right - left);
    cursor.setAttribute("d", `M${pixel} ${top}V${bottom}`);
    chart.append(cursor);
    tip.replaceChildren(`${label} ${text(place)}`);
    for (const curve of curves) {
      const [px, y, error] = nearest(curve.points, place, (point) => point[0]);
      // The x of the nearest point, if it differs from that of the cursor.
      const where = px === place ? "" : ` (at ${text(px)})`;
      const name = curves.length > 1 ? `${curve.name}: ` : "";
      const line = document.createElement("div");
      line.textContent = `${name}${text(y)}${error ? ` ± ${+error.toPrecision(2)}` : ""}${where}`;
      tip.append(line);
    }
    tip.hidden = false;
    const frame = chart.getBoundingClientRect();
    const middle = frame.left + (pixel / 420) * frame.width;
    const side = middle + 14 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, scrollX + (side ? middle - 14 - tip.offsetWidth : middle + 14))}px`;
    // Next to the cursor, or above the chart on a narrow screen.
    const wide = frame.width < 0.7 * document.documentElement.clientWidth;
    tip.style.top = `${Math.max(0, scrollY + frame.top + (wide ? 8 : 4 - tip.offsetHeight))}px`;
  }

  function hide() {
    tip.hidden = true;
    cursor.remove();
  }

  chart.addEventListener("pointermove", (event) => {
    const frame = chart.getBoundingClientRect();
    const pixel = ((event.clientX - frame.left) / frame.width) * 420;
    show(x0 + ((pixel - left) / (right - left)) * (x1 - x0));
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    const next = at < 0 ? (step > 0 ? 0 : places.length - 1) : at + step;
    show(places[Math.min(places.length - 1, Math.max(0, next))]);
  });
}
