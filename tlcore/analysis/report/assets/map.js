(() => {
const data = JSON.parse(document.getElementById("maps").textContent);
const choice = document.getElementById("which"), go = document.getElementById("goto");
const canvas = document.getElementById("map");
// The table comes later in the page: it is looked for when it is used.
const grid = new Grid(canvas, document.getElementById("cell"), row => {
  const text = document.getElementById("filter");
  text.value = grid.map.rows[row]; text.dispatchEvent(new Event("input"));
});
const marked = data.maps.findIndex(each => each.marked !== null);
data.maps.forEach((each, place) => { each.scale = data.scale; choice.add(new Option(each.name, place)); });
let shown = 0;
function choose(place) {
  shown = Number(place); choice.value = shown; grid.show(data.maps[shown]);
  options.forEach((each, at) => each.setAttribute("aria-selected", at === shown));
  if (options.length) strip.setAttribute("aria-activedescendant", options[shown].id);
}
// Small multiples: each map at a glance, by the largest of what shares a cell.
const strip = document.getElementById("steps");
const options = strip ? data.maps.map((each, place) => {
  const option = document.createElement("div"), small = document.createElement("canvas");
  option.id = `step-${place}`; option.className = "small"; option.setAttribute("role", "option");
  small.width = each.small[1]; small.height = each.small[0];
  option.append(small, each.name);
  option.addEventListener("click", () => choose(place));
  strip.append(option);
  return option;
}) : [];
function paint() {
  const colours = coloursOf(data.scale);
  options.forEach((option, place) => {
    const [rows, columns, text] = data.maps[place].small, bytes = bytesOf(text);
    const context = option.firstChild.getContext("2d");
    for (let at = 0; at < rows * columns; at++) {
      context.fillStyle = colours[bytes[at]];
      context.fillRect(at % columns, Math.floor(at / columns), 1, 1);
    }
  });
}
strip?.addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -1e9, End: 1e9 }[event.key];
  if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
  choose(Math.min(options.length - 1, Math.max(0, shown + by)));
  options[shown].scrollIntoView({ block: "nearest" }); event.preventDefault();
});
choice.addEventListener("change", () => choose(choice.value));
go.disabled = marked < 0;
go.addEventListener("click", () => { choose(marked); canvas.focus(); });
choose(Math.max(0, marked));
const swatches = () => document.querySelectorAll("#map-legend i").forEach(each => {
  each.style.background = coloursOf(data.scale)[Number(each.dataset.byte)];
});
theme.dark.addEventListener("change", () => { swatches(); paint(); }); swatches(); paint();
})();
