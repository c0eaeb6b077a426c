// Curves of metrics.jsonl: a snapshot, then the rows of each new step, over server-sent events.
"use strict";
(() => {
  const data = { step: [] };
  const charts = [];
  const probe = document.createElement("i");
  // A canvas does not know light-dark(): the browser resolves a colour where it is used as one.
  const style = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  const format = (v) => (v == null ? "–" : Number.isInteger(v) ? String(v) : Number(v.toPrecision(4)).toString());

  function options(figure, keys, width) {
    const colours = ["--line-1", "--line-2", "--line-3", "--line-4"].map(style);
    const axis = { stroke: style("--quiet"), grid: { stroke: style("--grid"), width: 1 }, ticks: { show: false },
      font: "12px system-ui, sans-serif" };
    const series = keys.map((key, k) => ({
      label: key, stroke: colours[k % colours.length], width: 2, spanGaps: true, points: { show: data.step.length < 2 },
      value: (_, v) => format(v), dash: k > 0 && keys.length === 2 ? [6, 4] : undefined,
    }));
    if (figure.dataset.bound) series.push({ label: "bound", stroke: style("--warn"), width: 1, dash: [3, 4], points: { show: false } });
    return {
      width, height: 190, series: [{ label: "step" }, ...series], cursor: { y: false, sync: { key: "steps" } },
      scales: { x: { time: false } }, legend: { live: true },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 54, values: (_, vs) => vs.map(format) }],
    };
  }

  function columns(figure, keys) {
    const rows = [data.step, ...keys.map((key) => data[key] || data.step.map(() => null))];
    if (figure.dataset.bound) rows.push(data.step.map(() => Number(figure.dataset.bound)));
    return rows;
  }

  // Without a pointer over the chart its legend tells the newest step.
  function showNewest(plot) {
    if (plot.data[0].length) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
  }

  function draw() {
    document.body.append(probe);
    for (const chart of charts.splice(0)) chart.plot.destroy();
    for (const figure of document.querySelectorAll("figure.chart")) {
      const box = figure.querySelector(".plot");
      const keys = figure.dataset.keys.split(",");
      const plot = new uPlot(options(figure, keys, box.clientWidth), columns(figure, keys), box);
      charts.push({ figure, keys, plot, box });
      showNewest(plot);
    }
  }

  function append(rows) {
    const before = data.step.length;
    const added = rows.step.length;
    for (const key of Object.keys(rows)) {
      if (!data[key]) data[key] = Array(before).fill(null);
      data[key].push(...rows[key]);
    }
    for (const key of Object.keys(data)) {
      while (data[key].length < before + added) data[key].push(null);
    }
  }

  function refresh() {
    for (const { figure, keys, plot } of charts) plot.setData(columns(figure, keys));
    // uPlot draws in a microtask of its own, which empties the legend.
    queueMicrotask(() => { for (const { plot } of charts) showNewest(plot); });
  }

  function showFigures(html) {
    const place = document.getElementById("figures");
    const opened = [...place.querySelectorAll("details")].map((part) => part.open);
    place.innerHTML = html;
    place.querySelectorAll("details").forEach((part, k) => { part.open = opened[k] ?? false; });
  }

  addEventListener("DOMContentLoaded", () => {
    draw();
    const source = new EventSource("/live");
    source.addEventListener("snapshot", (message) => {
      for (const key of Object.keys(data)) delete data[key];
      Object.assign(data, { step: [] }, JSON.parse(message.data));
      draw();
      refresh();
    });
    source.addEventListener("rows", (message) => { append(JSON.parse(message.data)); refresh(); });
    source.addEventListener("figures", (message) => showFigures(JSON.parse(message.data)));
    addEventListener("pagehide", () => source.close());
    addEventListener("pilaf:theme", draw);
    const fit = new ResizeObserver(() => {
      for (const { plot, box } of charts) if (box.clientWidth) plot.setSize({ width: box.clientWidth, height: 190 });
    });
    for (const grid of document.querySelectorAll(".charts")) fit.observe(grid);
  });
  // For tests and for the curious: what is drawn.
  window.pilafCharts = { data };
})();
