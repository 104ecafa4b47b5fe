// Each card shows an image and its caption. While a word is active, the overlay shows where the decoder attends.

for (const card of document.querySelectorAll(".card")) showAttention(card);

function showAttention(card) {
  const caption = card.querySelector(".caption");
  const image = card.querySelector("img");
  const boxes = card.querySelector(".boxes");
  const status = card.querySelector(".status");
  const grid = [Number(caption.dataset.rows), Number(caption.dataset.columns)];
  const [width, height] = ["width", "height"].map((name) => Number(image.getAttribute(name))); // px, before scaling
  const overlay = new AttentionOverlay(card.querySelector(".attention-overlay"), width, height, grid);
  const selection = new WordSelection((word) => {
    boxes.replaceChildren();
    status.textContent = "";
    if (word === null) return overlay.hide();
    const percent = Math.round(100 * word.dataset.peak);
    const region = `${word.textContent}: ${percent}% of attention on one of ${grid[0] * grid[1]} regions`;
    status.textContent = [region, sentinelLabel(word.dataset.sentinel)].filter(Boolean).join(" · ");
    boxes.replaceChildren(...JSON.parse(word.dataset.boxes).map(boxElement));
    overlay.show(word.dataset.map);
  });
  selection.addCaption(caption);
}

// box: left, top, width and height, as fractions of the image's width and height.
function boxElement([x, y, width, height]) {
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x, y, width, height })) rect.setAttribute(name, value);
  return rect;
}
