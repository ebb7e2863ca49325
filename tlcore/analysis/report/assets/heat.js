document.querySelectorAll("canvas.heat:not(.shown)").forEach(canvas => {
  canvas.classList.add("shown");
  const map = JSON.parse(document.getElementById(canvas.id + "-data").textContent);
  new Grid(canvas, document.getElementById(canvas.id + "-told"), row => {
    const text = document.getElementById("filter");
    // The rows of a tensor are nothing that the table has.
    if (map.line || !text) return;
    text.value = map.rows[row]; text.dispatchEvent(new Event("input"));
  }).show(map);
});
