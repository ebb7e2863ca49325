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
function choose(place) { choice.value = place; grid.show(data.maps[place]); }
choice.addEventListener("change", () => choose(choice.value));
go.disabled = marked < 0;
go.addEventListener("click", () => { choose(marked); canvas.focus(); });
choose(Math.max(0, marked));
const swatches = () => document.querySelectorAll("#map-legend i").forEach(each => {
  each.style.background = coloursOf(data.scale)[Number(each.dataset.byte)];
});
theme.dark.addEventListener("change", swatches); swatches();
})();
