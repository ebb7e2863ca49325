document.querySelectorAll("canvas.heat").forEach(canvas => {
  const map = JSON.parse(document.getElementById(canvas.id + "-data").textContent);
  new Grid(canvas, document.getElementById(canvas.id + "-told"), () => {}).show(map);
});
