"use strict";
// A field of coloured cells that is told by keyboard and pointer alike. Only what is in sight is drawn.
const theme = { dark: matchMedia("(prefers-color-scheme: dark)"), grids: [] };
function themed(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function rgb(name) {
  const digits = themed(name).slice(1), short = digits.length === 3;
  return [0, 1, 2].map(i => parseInt(short ? digits[i] + digits[i] : digits.slice(2 * i, 2 * i + 2), 16));
}
theme.dark.addEventListener("change", () => theme.grids.forEach(each => each.recolour()));
// A byte: 0 equal, 1 to 250 the size on a logarithmic scale, 254 not finite, 255 nothing there.
const sizeOf = (byte, scale) => 10 ** ((byte - 1) / 249 * scale.decades + scale.low);
function coloursOf(scale) {
  const stops = [0, 1, 2, 3, 4].map(each => rgb(`--ramp${each}`));
  const mix = byte => {
    const along = (Math.log10(sizeOf(byte, scale)) - scale.from) / (scale.to - scale.from) * 4;
    const place = Math.min(3.999, Math.max(0, along)), low = Math.floor(place);
    return stops[low].map((each, i) => Math.round(each + (stops[low + 1][i] - each) * (place - low)));
  };
  const fixed = { 0: rgb("--equal"), 254: rgb("--broken"), 255: rgb("--none") };
  return [...Array(256).keys()].map(byte => `rgb(${fixed[byte] || mix(byte)})`);
}
function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
  return bytes;
}

class Grid {
  // `told` is where the cell under the cursor is said, `enter` is called with its row.
  constructor(canvas, told, enter) {
    Object.assign(this, { canvas, told, enter, at: [0, 0], map: null, pending: false });
    this.inner = canvas.parentElement;
    this.box = this.inner.parentElement;
    this.box.addEventListener("scroll", () => this.later());
    new ResizeObserver(() => this.later()).observe(this.box);
    canvas.addEventListener("mousemove", event => { const at = this.under(event); if (at) this.move(...at, false); });
    canvas.addEventListener("click", event => {
      const at = this.under(event);
      if (at) { this.move(...at, false); this.enter(at[0]); }
    });
    canvas.addEventListener("keydown", event => this.key(event));
    theme.grids.push(this);
  }
  show(map) {
    this.map = map;
    map.bytes ??= bytesOf(map.cells);
    const roomy = map.texts ? 14 : 3, columns = map.columns;
    const broad = this.box.clientWidth || 1100;
    this.width = Math.max(roomy, Math.min(24, Math.floor((broad - (map.height ? 80 : 360)) / columns)));
    this.height = map.height || 14;
    this.top = map.texts ? 96 : 22;
    const longest = map.rows.reduce((most, each) => Math.max(most, each.length), 0);
    this.left = Math.min(330, 16 + Math.ceil(longest * 6.63));
    this.inner.style.width = `${this.left + columns * this.width + 8}px`;
    this.inner.style.height = `${this.top + map.rows.length * this.height}px`;
    this.box.scrollTo(0, 0);
    this.at = [map.marked ?? 0, map.markedColumn ?? 0];
    this.recolour();
    this.move(...this.at);
  }
  recolour() {
    if (!this.map) return;
    this.colours = coloursOf(this.map.scale);
    this.ink = { text: themed("--ink"), soft: themed("--soft"), bad: themed("--bad"), box: themed("--box"),
      focus: themed("--focus") };
    this.later();
  }
  later() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }
  draw() {
    const { canvas, box, map } = this, ratio = devicePixelRatio || 1;
    if (!map) return;
    const total = this.inner.style;
    const w = Math.min(box.clientWidth, parseInt(total.width)), h = Math.min(box.clientHeight || 560, parseInt(total.height));
    if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
      canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio);
      canvas.style.width = `${w}px`; canvas.style.height = `${h}px`;
    }
    const context = this.context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = this.ink.box; context.fillRect(0, 0, w, h);
    const first = Math.floor(box.scrollTop / this.height), x0 = this.left - box.scrollLeft, y0 = this.top - box.scrollTop;
    const last = Math.min(map.rows.length, first + Math.ceil(h / this.height) + 1);
    const begin = Math.floor(box.scrollLeft / this.width);
    const end = Math.min(map.columns, begin + Math.ceil(w / this.width) + 1);
    for (let row = first; row < last; row++) this.line(row, begin, end, x0, y0);
    this.frames(x0, y0);
    this.names(first, last, y0, h);
    this.axis(begin, end, x0, w);
  }
  line(row, begin, end, x0, y0) {
    const { context, map, width, height } = this, y = y0 + row * height, gap = width > 6 ? 1 : 0;
    const tall = height > 6 && !map.height ? height - 1 : height;
    for (let column = begin; column < end;) {
      const byte = map.bytes[row * map.columns + column];
      let next = column + 1;
      // Neighbours of one colour are one rectangle where no gap is between.
      while (!gap && next < end && map.bytes[row * map.columns + next] === byte) next++;
      context.fillStyle = this.colours[byte];
      context.fillRect(x0 + column * width, y, (next - column) * width - gap, tall);
      column = next;
    }
  }
  frames(x0, y0) {
    const { map, width, height } = this;
    // With an edge in the colour of the page, so that they are seen on every cell.
    const frame = (row, column, columns, colour) => [[this.ink.box, 5], [colour, 2]].forEach(([style, wide]) => {
      this.context.strokeStyle = style; this.context.lineWidth = wide;
      this.context.strokeRect(x0 + column * width - .5, y0 + row * height - .5, columns * width, height);
    });
    if (map.marked !== null) {
      const one = map.markedColumn ?? null;
      frame(map.marked, one ?? 0, one === null ? map.columns : 1, this.ink.text);
    }
    frame(this.at[0], this.at[1], Math.max(1, 3 / width), this.ink.focus);
  }
  names(first, last, y0, h) {
    const { context, map } = this;
    context.fillStyle = this.ink.box; context.fillRect(0, 0, this.left, h);
    context.font = "11px ui-monospace, 'DejaVu Sans Mono', monospace";
    context.textBaseline = "middle"; context.textAlign = "right";
    const most = Math.floor((this.left - 12) / 6.63);
    const every = Math.ceil(12 / this.height);
    for (let row = first; row < last; row++) {
      if (row % every) continue;
      const name = map.rows[row];
      context.fillStyle = row === map.marked ? this.ink.bad : row === this.at[0] ? this.ink.text : this.ink.soft;
      const shown = name.length > most ? "…" + name.slice(1 - most) : name;
      context.fillText(shown, this.left - 8, y0 + (row + .5) * this.height);
    }
  }
  axis(begin, end, x0, w) {
    const { context, map, width } = this;
    context.fillStyle = this.ink.box; context.fillRect(0, 0, w, this.top);
    context.save();
    context.beginPath(); context.rect(this.left - 2, 0, w, this.top); context.clip();
    context.textAlign = "left"; context.textBaseline = "middle";
    const every = map.texts ? 1 : Math.ceil((map.label || 44) / width);
    for (let column = begin; column < end; column++) {
      if (column % every) continue;
      context.fillStyle = column === this.at[1] ? this.ink.text : this.ink.soft;
      const x = x0 + column * width;
      if (map.texts) {
        const text = map.texts[column] ?? "";
        context.save(); context.translate(x + width / 2, this.top - 5); context.rotate(-Math.PI / 2);
        context.fillText(text.length > 13 ? text.slice(0, 12) + "…" : text, 0, 0); context.restore();
      } else context.fillText(this.label(column), x, this.top / 2);
    }
    context.restore();
    context.textAlign = "right"; context.fillStyle = this.ink.soft;
    if (this.left > 60) context.fillText(map.texts ? "token" : map.unit, this.left - 8, map.texts ? this.top - 12 : this.top / 2);
  }
  label(column) {
    const { map } = this;
    return map.names ? map.names[column] : String(map.starts ? map.starts[column] : map.first + column);
  }
  range(column) {
    const { map } = this;
    if (!map.starts) return this.label(column);
    const last = (map.starts[column + 1] ?? map.end) - 1;
    return last > map.starts[column] ? `${map.starts[column]} to ${last}` : String(last);
  }
  tell() {
    const { map } = this, [row, column] = this.at, byte = map.bytes[row * map.columns + column];
    const scale = map.scale, said = scale.words || {};
    const what = byte === 0 ? said.equal || "equal" : byte === 254 ? said.broken || "NaN or Inf in one run alone"
      : byte === 255 ? "not there" : said[byte] ? said[byte]
      : (byte === 250 && !scale.exact ? "at least " : "") + sizeOf(byte, scale).toPrecision(2) + ` ${scale.unit}`;
    const text = map.texts?.[column] ? ` “${map.texts[column]}”` : "";
    this.told.textContent = `${map.line ? map.line + " " : ""}${map.rows[row]}, ${map.unit} ${this.range(column)}${text}: ${what}`;
  }
  move(row, column, reveal = true) {
    const { map, box } = this;
    this.at = [Math.min(map.rows.length - 1, Math.max(0, row)), Math.min(map.columns - 1, Math.max(0, column))];
    if (reveal) {
      const y = this.at[0] * this.height, x = this.at[1] * this.width;
      const high = box.clientHeight - this.top, broad = box.clientWidth - this.left;
      if (y < box.scrollTop || y > box.scrollTop + high - this.height) box.scrollTop = Math.max(0, y - high / 2);
      if (x < box.scrollLeft || x > box.scrollLeft + broad - this.width) box.scrollLeft = Math.max(0, x - broad / 2);
    }
    this.tell();
    this.later();
  }
  under(event) {
    const row = Math.floor((event.offsetY - this.top + this.box.scrollTop) / this.height);
    const column = Math.floor((event.offsetX - this.left + this.box.scrollLeft) / this.width);
    const inside = event.offsetY >= this.top && row < this.map.rows.length && column < this.map.columns;
    return inside ? [row, Math.max(0, column)] : null;
  }
  key(event) {
    const page = Math.max(1, Math.floor((this.box.clientHeight - this.top) / this.height) - 1), all = 1e9;
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-page, 0],
      PageDown: [page, 0], Home: [0, -all], End: [0, all] }[event.key];
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter") this.enter(this.at[0]);
    else if (by) this.move(this.at[0] + by[0], this.at[1] + by[1]);
    else return;
    event.preventDefault();
  }
}
