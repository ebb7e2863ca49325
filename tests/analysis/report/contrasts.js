// Of each element: what stands behind it, and the contrast of its text as WCAG has it.
wanted => [...document.querySelectorAll(wanted)].filter(each => each === document.body || each.offsetParent && each.textContent.trim())
.map(each => {
  const parse = text => text.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  let behind = each;
  while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const back = light(parse(getComputedStyle(behind).backgroundColor)), ink = light(parse(getComputedStyle(each).color));
  const contrast = (Math.max(back, ink) + .05) / (Math.min(back, ink) + .05);
  return { text: each.textContent.slice(0, 40), luminance: back, contrast };
})
