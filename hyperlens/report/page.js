"use strict";
// Draws every chart and token view from the JSON beside it. Nothing is fetched.
(() => {
  const props = (element) => JSON.parse(element.querySelector("script").textContent);

  // Colours are names of the style sheet's, so light, dark and paper need no second drawing.
  const ink = "var(--ink)", faint = "var(--faint)", line = "var(--line)";
  const theme = {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      labelColor: faint, titleColor: faint, titleFontWeight: "normal", titleFontSize: 12,
      labelFontSize: 11, gridColor: line, domainColor: line, tickColor: line,
    },
    legend: { labelColor: ink, labelFontSize: 12 },
    range: { category: [1, 2, 3, 4, 5].map((i) => `var(--pair-${i})`) },
  };
  // With ast, expressions are interpreted: the page may not compile code.
  const options = { renderer: "svg", actions: false, ast: true, config: theme };

  const drawChart = async (element) => {
    const spec = props(element);
    const place = document.createElement("div");
    place.style.width = "100%";
    element.replaceChildren(place);
    await window.vegaEmbed(place, spec, options);
  };

  // circuitsvis writes a token as HTML in the text and as plain text in its tooltip. A joiner of no
  // width keeps < and & from starting anything there and reads the same in both.
  const shown = (token) => token.replace(/[<&]/g, "$&\u2060").replace(/\n/g, "¶");
  // A value that colours as a logarithm and reads as a rank.
  const ranked = (rank) =>
    Object.assign([`base rank ${rank.toLocaleString("en")}`], { valueOf: () => Math.log10(rank) });

  let views = 0;
  const drawTokens = (element) => {
    const given = props(element);
    element.id = `tokens-${views++}`;
    CircuitsVis.render(element.id, CircuitsVis.ColoredTokens, {
      tokens: given.tokens.map(shown), values: given.ranks.map(ranked),
      minValue: 0, maxValue: Math.log10(given.deepest), positiveColor: given.colour,
    });
  };

  // What is folded away has no width yet: it is drawn when it is opened.
  const visible = (element) => !element.closest("details:not([open])");
  const breath = () => new Promise((done) => setTimeout(done));
  const draw = async (root) => {
    for (const element of root.querySelectorAll(".chart, .tokens")) {
      if (element.dataset.drawn || !visible(element)) continue;
      element.dataset.drawn = "yes";
      if (element.matches(".chart")) await drawChart(element);
      else drawTokens(element);
      // Lets the page be read and scrolled between two drawings.
      await breath();
    }
  };

  draw(document).then(() => { document.documentElement.dataset.drawn = "yes"; });
  document.addEventListener("toggle", (event) => draw(event.target), true);
})();
