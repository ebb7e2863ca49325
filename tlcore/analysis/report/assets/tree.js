(() => {
const data = JSON.parse(document.getElementById("modules").textContent), HEIGHT = 24;
const box = document.getElementById("tree"), inner = box.firstElementChild, said = document.getElementById("node");
const root = { name: "_root", full: "", parent: null, children: new Map(), worst: 255, tensors: 0, apart: 0, open: true };
// Nothing there is less than equal, and not finite is the most.
const rank = byte => byte === 255 ? -1 : byte;
function node(full) {
  let at = root;
  for (const part of full === "" ? [] : full.split(".")) {
    if (!at.children.has(part)) at.children.set(part, { name: part, full: at.full ? `${at.full}.${part}` : part,
      parent: at, children: new Map(), worst: 255, tensors: 0, apart: 0, open: false });
    at = at.children.get(part);
  }
  return at;
}
for (const [name, worst, tensors, apart] of data.modules)
  for (let at = node(name); at; at = at.parent) {
    if (rank(worst) > rank(at.worst)) at.worst = worst;
    at.tensors += tensors; at.apart += apart;
  }
const first = data.first === null ? null : node(data.first);
let rows = [], current = root, pending = false, colours = coloursOf(data.scale);
function listed(at, level) {
  rows.push([at, level]);
  if (at.open) for (const child of at.children.values()) listed(child, level + 1);
}
function lay() {
  rows = []; listed(root, 1);
  inner.style.height = `${rows.length * HEIGHT}px`;
  later();
}
function later() {
  if (pending) return;
  pending = true; requestAnimationFrame(() => { pending = false; draw(); });
}
const size = at => at.worst === 255 ? "" : at.worst === 0 ? "equal" : at.worst === 254 ? "NaN, Inf or shape"
  : `${at.worst === 250 ? "at least " : ""}${sizeOf(at.worst, data.scale).toPrecision(2)} ${data.scale.unit}`;
const what = at => `${at.apart ? `${at.apart} of ` : ""}${at.tensors} tensors${at.apart ? " do not agree" : ""}`;
function part(kind, text) {
  const made = document.createElement("span");
  made.className = kind; made.textContent = text;
  return made;
}
function line([at, level], place) {
  const made = document.createElement("div"), swatch = part("swatch", "");
  made.className = at === first ? "item first" : "item";
  made.id = `item-${place}`;
  Object.assign(made.style, { top: `${place * HEIGHT}px`, paddingLeft: `${(level - 1) * 18 + 8}px` });
  made.setAttribute("role", "treeitem"); made.setAttribute("aria-level", level);
  made.setAttribute("aria-selected", at === current);
  if (at.children.size) made.setAttribute("aria-expanded", at.open);
  swatch.style.background = colours[at.worst];
  made.append(part("fold", at.children.size ? at.open ? "▾" : "▸" : ""), swatch,
    part("name", at.name + (at === first ? " · first divergence" : "")),
    part("what", [what(at), size(at)].filter(Boolean).join(", ")));
  made.addEventListener("click", () => { if (at.children.size) at.open = !at.open; lay(); select(at); if (!at.children.size) find(); });
  return made;
}
function draw() {
  const begin = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 2);
  const end = Math.min(rows.length, begin + Math.ceil(box.clientHeight / HEIGHT) + 5);
  inner.replaceChildren(...rows.slice(begin, end).map((row, i) => line(row, begin + i)));
  box.setAttribute("aria-activedescendant", `item-${rows.findIndex(row => row[0] === current)}`);
}
function select(at) {
  current = at;
  const top = rows.findIndex(row => row[0] === at) * HEIGHT;
  if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - HEIGHT)
    box.scrollTop = Math.max(0, top - box.clientHeight / 2);
  said.textContent = `${at.full || at.name}: ${[what(at), size(at)].filter(Boolean).join(", ")}`;
  later();
}
function find() {
  const text = document.getElementById("filter");
  text.value = current.full || "_root"; text.dispatchEvent(new Event("input"));
}
function reveal(at) {
  for (let up = at.parent; up; up = up.parent) up.open = true;
  lay(); select(at);
}
function fold(open) {
  const all = at => { at.open = open || at === root; at.children.forEach(all); };
  all(root); lay(); select(open ? current : root);
}
box.addEventListener("scroll", later);
box.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const at = rows.findIndex(row => row[0] === current), page = Math.floor(box.clientHeight / HEIGHT) - 1;
  const go = to => select(rows[Math.min(rows.length - 1, Math.max(0, to))][0]);
  const turn = open => { current.open = open; lay(); select(current); };
  const acts = {
    ArrowDown: () => go(at + 1), ArrowUp: () => go(at - 1), PageDown: () => go(at + page), PageUp: () => go(at - page),
    Home: () => go(0), End: () => go(rows.length - 1), Enter: find,
    ArrowRight: () => current.open || !current.children.size ? go(at + 1) : turn(true),
    ArrowLeft: () => current.open && current.children.size ? turn(false) : current.parent && select(current.parent),
  };
  if (acts[event.key]) { acts[event.key](); event.preventDefault(); }
});
const goes = document.getElementById("reveal");
goes.disabled = first === null;
goes.addEventListener("click", () => { reveal(first); box.focus(); });
document.getElementById("unfold").addEventListener("click", () => fold(true));
document.getElementById("foldall").addEventListener("click", () => fold(false));
// One key from anywhere on the page, but not while text is typed.
document.addEventListener("keydown", event => {
  if (event.key !== "f" || event.ctrlKey || event.altKey || event.metaKey || first === null) return;
  if (event.target.matches("input[type=search], select")) return;
  goes.click(); box.scrollIntoView({ block: "center" });
});
theme.dark.addEventListener("change", () => { colours = coloursOf(data.scale); later(); });
lay();
if (first) reveal(first); else select(root);
})();
