// Puts every chart into its place and switches between light and dark.
const theme = document.getElementById("theme");
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  theme.setAttribute("aria-pressed", String(name === "dark"));
  redraw.forEach((again) => again());
}
theme.addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = DATA.charts[figure.dataset.chart];
  ({ lines, heat, matrices })[chart.kind](figure, chart);
}
document.body.dataset.ready = "yes";
