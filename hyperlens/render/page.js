"use strict";
// Draws every chart from the JSON beside it. Nothing is fetched.
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
      title: { color: ink },
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

  // What is folded away has no width yet: it is drawn when it is opened.
  const visible = (element) => !element.closest("details:not([open])");
  const onScreen = (element) => element.getBoundingClientRect().top < window.innerHeight;

  // One chart at a time, with room between for the browser to paint and to scroll: first those on
  // the screen.
  const turn = () => new Promise((resolve) => setTimeout(resolve));
  const draw = async (root) => {
    const all = [...root.querySelectorAll(".chart")].filter(visible);
    for (const element of [...all.filter(onScreen), ...all]) {
      if (element.dataset.drawn) continue;
      element.dataset.drawn = "yes";
      await drawChart(element);
      await turn();
    }
  };
  const redraw = () => document.querySelectorAll(".chart").forEach((e) => { if (e.dataset.drawn) drawChart(e); });

  draw(document).then(() => { document.documentElement.dataset.drawn = "yes"; });
  document.addEventListener("toggle", (event) => draw(event.target), true);
  dark.addEventListener("change", redraw);
})();
