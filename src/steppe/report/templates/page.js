"use strict";
(() => {
  const root = document.documentElement;
  const coarse = matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();
  let axis = "epoch";
  const figures = [...document.querySelectorAll(".plot")].map((node) => [node, node.nextElementSibling.textContent]);

  // figures name the style sheet's colours, so they follow its schemes
  const colour = (_, name) => getComputedStyle(root).getPropertyValue(name).trim();

  function draw([node, text]) {
    const { data, layout } = JSON.parse(text.replace(/var\((--[a-z0-9-]+)\)/g, colour));
    for (const trace of data) {
      if (hidden.has(trace.name)) trace.visible = false;
      if ("curves" in node.dataset && trace.meta) trace.x = trace.meta[axis];
    }
    if ("curves" in node.dataset) {
      layout.xaxis.title.text = axis;
      if (axis !== "epoch") delete layout.xaxis.dtick;
    }
    if ("ways" in node.dataset) cut(data, reachOf(node));
    if (coarse) layout.dragmode = false; // a finger scrolls the page, it does not draw a zoom box
    Plotly.react(node, data, layout, { displayModeBar: false, responsive: true });
  }

  // evaluations at which a slider cuts the ways of its figures; printed ways are whole
  function reachOf(node) {
    const player = node.closest(".ways").querySelector(".player");
    if (!player || root.classList.contains("printing")) return Infinity;
    return +player.dataset.counts.split(" ")[player.querySelector("input").value];
  }
  function cut(data, most) {
    let end; // of the way before it in the figure: where a head stands
    for (const trace of data) {
      if (trace.meta?.evaluations) {
        const n = trace.meta.evaluations.filter((count) => count <= most).length;
        for (const key of ["x", "y", "customdata"]) trace[key] = trace[key].slice(0, n);
        end = [trace.x.slice(-1), trace.y.slice(-1)];
      } else if (trace.meta?.head) [trace.x, trace.y] = end;
    }
  }
  for (const player of document.querySelectorAll(".player")) {
    const [button, slider, output] = player.children;
    const own = figures.filter(([node]) => player.parentNode.contains(node));
    const counts = player.dataset.counts.split(" ");
    let timer = 0;
    const show = () => {
      output.textContent = `${Number(counts[slider.value]).toLocaleString("en")} evaluations`;
      own.forEach(draw);
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      button.textContent = "▶";
      button.setAttribute("aria-label", "Play");
    };
    button.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      button.textContent = "❚❚";
      button.setAttribute("aria-label", "Pause");
      timer = setInterval(() => {
        slider.stepUp();
        show();
        if (slider.value === slider.max) stop();
      }, 120);
      show();
    });
    slider.addEventListener("input", () => { stop(); show(); });
    output.textContent = `${Number(counts.at(-1)).toLocaleString("en")} evaluations`;
  }
  const drawAll = () => figures.forEach(draw);

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const { name } = button.dataset;
      if (!hidden.delete(name)) hidden.add(name);
      for (const twin of document.querySelectorAll(".legend button"))
        if (twin.dataset.name === name) twin.setAttribute("aria-pressed", String(!hidden.has(name)));
      drawAll();
    });
  }
  for (const button of document.querySelectorAll(".switch button")) {
    button.addEventListener("click", () => {
      axis = button.dataset.axis;
      for (const twin of button.parentNode.children) twin.setAttribute("aria-pressed", String(twin === button));
      drawAll();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { root.classList.add("printing"); drawAll(); });
  addEventListener("afterprint", () => { root.classList.remove("printing"); drawAll(); });
  drawAll();
})();
