"use strict";

const SIDE = 128; // px of a veil, which the browser stretches over the picture
const DARK = [12, 14, 20, 0.78]; // red, green, blue and opacity where nothing was looked at
const LIT = [255, 178, 60, 0.16]; // and where most attention lay
const FADE = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 180; // ms from one word's light to the next

// What each cell of a row counts for at each pixel, by a cubic B-spline: smooth, and it never overshoots.
function spline(cells) {
  return Array.from({ length: SIDE }, (_, pixel) => {
    const at = ((pixel + 0.5) / SIDE) * cells - 0.5;
    const weights = new Float64Array(cells);
    for (let cell = Math.floor(at) - 1; cell <= Math.floor(at) + 2; cell++) {
      const t = Math.abs(at - cell);
      const weight = t < 1 ? (4 - 6 * t ** 2 + 3 * t ** 3) / 6 : Math.max(0, 2 - t) ** 3 / 6;
      weights[Math.min(Math.max(cell, 0), cells - 1)] += weight; // beyond the border all is as at it
    }
    return weights;
  });
}

// The light of each pixel, 0 to 1, from a map of rows by columns and their splines.
function smooth(map, down, across) {
  const columns = across[0].length;
  const light = new Float64Array(SIDE * SIDE);
  down.forEach((ofRows, y) => {
    const line = across[0].map((_, column) =>
      ofRows.reduce((sum, weight, row) => sum + weight * map[row * columns + column], 0),
    );
    across.forEach((ofColumns, x) => {
      light[y * SIDE + x] = ofColumns.reduce((sum, weight, column) => sum + weight * line[column], 0);
    });
  });
  const most = Math.max(...light);
  return light.map((value) => value / most);
}

function paint(context, light) {
  const image = context.createImageData(SIDE, SIDE);
  light.forEach((share, pixel) => {
    const color = DARK.map((dark, channel) => dark + share * (LIT[channel] - dark));
    image.data.set([...color.slice(0, 3), 255 * color[3]], 4 * pixel);
  });
  context.putImageData(image, 0, 0);
}

function enliven(card) {
  const caption = card.querySelector(".caption");
  const words = [...caption.querySelectorAll(".word")];
  const veil = card.querySelector(".veil");
  const boxes = card.querySelector(".boxes");
  const told = card.querySelector(".told");
  const rows = Number(caption.dataset.rows);
  const columns = Number(caption.dataset.columns);
  const down = spline(rows);
  const across = spline(columns);
  const context = veil.getContext("2d");
  veil.width = veil.height = SIDE;
  const lights = new Map(); // of words shown before
  let pinned = null; // the word that has the focus
  let shown = null;
  let light = null; // as painted
  let frame = 0;

  function lightOf(word) {
    if (!lights.has(word)) {
      const map = Uint8Array.from(atob(word.dataset.map), (byte) => byte.charCodeAt(0));
      lights.set(word, smooth(map, down, across));
    }
    return lights.get(word);
  }

  function show(word) {
    if (word === shown) return;
    shown?.setAttribute("aria-pressed", "false");
    shown = word;
    card.classList.toggle("looking", word !== null);
    boxes.replaceChildren();
    told.textContent = "";
    if (word === null) return;
    word.setAttribute("aria-pressed", "true");
    const share = Math.round(100 * word.dataset.peak);
    told.textContent = `${word.textContent}: ${share}% of attention on one of ${rows * columns} regions`;
    for (const [x, y, width, height] of JSON.parse(word.dataset.boxes)) {
      const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [name, value] of Object.entries({ x, y, width, height })) box.setAttribute(name, value);
      boxes.append(box);
    }
    fade(lightOf(word));
  }

  function fade(target) {
    const from = light ?? target;
    const start = performance.now();
    cancelAnimationFrame(frame);
    const step = (now) => {
      const share = FADE ? Math.min(1, Math.max(0, (now - start) / FADE)) : 1;
      light = target.map((value, i) => from[i] + share * (value - from[i]));
      paint(context, light);
      if (share < 1) frame = requestAnimationFrame(step);
    };
    step(start);
  }

  function pin(word) {
    pinned = word;
    for (const other of words) other.tabIndex = other === (word ?? words[0]) ? 0 : -1;
    show(word);
  }

  // Touch keeps sending moves to the word where it began, so ask what lies under the finger.
  caption.addEventListener("pointermove", (event) => {
    const word = document.elementFromPoint(event.clientX, event.clientY)?.closest(".word");
    if (words.includes(word)) show(word);
  });
  caption.addEventListener("pointerleave", () => show(pinned));
  caption.addEventListener("click", (event) => event.target.closest(".word")?.focus());
  caption.addEventListener("focusin", (event) => pin(event.target.closest(".word")));
  caption.addEventListener("focusout", () => pin(null));
  caption.addEventListener("keydown", (event) => {
    const at = words.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 }[event.key];
    if (event.key === "Escape") event.target.blur();
    if (to === undefined) return;
    event.preventDefault();
    words[Math.min(Math.max(to, 0), words.length - 1)].focus();
  });
}

document.querySelectorAll(".card").forEach(enliven);
