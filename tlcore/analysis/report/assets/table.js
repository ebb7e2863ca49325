(() => {
const LIMIT = 200, table = JSON.parse(document.getElementById("rows").textContent);
const text = document.getElementById("filter"), only = document.getElementById("only");
const body = document.querySelector("#tensors tbody"), heads = [...document.querySelectorAll("#tensors th")];
const collator = new Intl.Collator("en", { numeric: true });
let order = null, down = false, waiting = 0;
// A row is its cells, then whether it is marked; what the filter looks at is made once, when it is needed.
const words = row => row.words ??= row.slice(0, -1).join(" ").toLowerCase();
const marked = row => row[row.length - 1];
const numeric = value => { const found = parseFloat(value); return isNaN(found) ? -Infinity : found; };
function compare(a, b) {
  const [x, y] = [a[order], b[order]];
  const by = table.numbers.includes(order) ? numeric(x) - numeric(y) : collator.compare(x, y);
  return down ? -by : by;
}
function show() {
  const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let fits = table.rows.filter(row => (!only.checked || marked(row))
    && wanted.every(word => words(row).includes(word)));
  if (order !== null) fits = fits.sort(compare);
  body.replaceChildren(...fits.slice(0, LIMIT).map(row => {
    const line = document.createElement("tr");
    row.slice(0, -1).forEach((cell, place) => {
      const field = line.insertCell();
      field.textContent = cell;
      if (table.numbers.includes(place)) field.className = "number";
      if (place === table.status) field.classList.add(marked(row) ? "bad" : "good");
    });
    return line;
  }));
  const more = fits.length > LIMIT ? `, the first ${LIMIT} shown` : "";
  document.getElementById("shown").textContent = `${fits.length} of ${table.rows.length} tensors${more}`;
}
heads.forEach((head, place) => head.firstChild.addEventListener("click", () => {
  down = order === place ? !down : table.numbers.includes(place);
  order = place;
  heads.forEach(each => { each.classList.remove("up", "down"); each.removeAttribute("aria-sort"); });
  head.classList.add(down ? "down" : "up");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  show();
}));
text.addEventListener("input", show); only.addEventListener("change", show); show();
})();
