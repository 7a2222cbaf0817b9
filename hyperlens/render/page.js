"use strict";
// Draws every chart and token view from the JSON beside it. Nothing is fetched.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const props = (element) => JSON.parse(element.querySelector("script").textContent);

  const theme = () => {
    const ink = colour("--ink"), faint = colour("--faint"), line = colour("--line");
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: {
        labelColor: faint, titleColor: faint, titleFontWeight: "normal", titleFontSize: 12,
        labelFontSize: 11, gridColor: line, domainColor: line, tickColor: line,
      },
      legend: { labelColor: ink, labelFontSize: 12 },
      range: { category: [1, 2, 3, 4, 5].map((i) => colour(`--pair-${i}`)) },
    };
  };

  const drawChart = async (element) => {
    element.spec = element.spec || props(element);
    const place = document.createElement("div");
    place.style.width = "100%";
    element.replaceChildren(place);
    const options = {
      renderer: "svg", actions: false, config: theme(), tooltip: { theme: dark.matches ? "dark" : "light" },
    };
    await window.vegaEmbed(place, JSON.parse(JSON.stringify(element.spec)), options);
  };

  let views = 0;
  const drawTokens = (element) => {
    const given = props(element);
    element.id = `tokens-${views++}`;
    CircuitsVis.render(element.id, CircuitsVis.ColoredTokens, given);
  };

  // What is folded away has no width yet: it is drawn when it is opened.
  const visible = (element) => !element.closest("details:not([open])");
  const onScreen = (element) => element.getBoundingClientRect().top < window.innerHeight;

  // One view at a time, with room between for the browser to paint and to scroll: first what is on
  // the screen, then the charts, then the long texts.
  const turn = () => new Promise((resolve) => setTimeout(resolve));
  const draw = async (root) => {
    const waiting = (kind, paint) => [...root.querySelectorAll(kind)].filter(visible).map((e) => [e, paint]);
    const all = [...waiting(".chart", drawChart), ...waiting(".tokens", drawTokens)];
    const first = all.filter(([element]) => onScreen(element));
    for (const [element, paint] of [...first, ...all]) {
      if (element.dataset.drawn) continue;
      element.dataset.drawn = "yes";
      await paint(element);
      await turn();
    }
  };
  const redraw = () => document.querySelectorAll(".chart").forEach((e) => { if (e.dataset.drawn) drawChart(e); });

  draw(document).then(() => { document.documentElement.dataset.drawn = "yes"; });
  document.addEventListener("toggle", (event) => draw(event.target), true);
  dark.addEventListener("change", redraw);
})();
