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
      if (trace.meta) trace.x = trace.meta[axis];
    }
    if ("curves" in node.dataset) {
      layout.xaxis.title.text = axis;
      if (axis !== "epoch") delete layout.xaxis.dtick;
    }
    if (coarse) layout.dragmode = false; // a finger scrolls the page, it does not draw a zoom box
    Plotly.react(node, data, layout, { displayModeBar: false, responsive: true });
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
