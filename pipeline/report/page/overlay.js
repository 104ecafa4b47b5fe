// The attention overlay of the report and the app. While a word of a caption is active, the image keeps its colors and
// glows where the decoder attends for that word; elsewhere it is gray and dimmed.
//
// pipeline/report/overlay.py puts the constants DIMMED_BRIGHTNESS and GLOW before this script.

const MASK_SIZE = 128; // px; the browser scales the mask to the image
const MAX_CANVAS_SIZE = 1024; // px, longer side
const FADE_HALF_LIFE = 60; // ms, when the attention of one word fades into that of the next

// Draws attention over an image.
class AttentionOverlay {
  #element;
  #image;
  #canvas;
  #context;
  #mask = document.createElement("canvas");
  #maskContext;
  #maskPixels;
  #grid;
  #target = null; // [MASK_SIZE * MASK_SIZE], 0 to 1
  #current = new Float32Array(MASK_SIZE * MASK_SIZE); // as drawn; moves towards the target
  #frame = 0;
  #previousTime = 0;

  // element: `.attention-overlay`, which holds the <img> and a <canvas>.
  // width, height: of the image, in px.
  // grid: [rows, columns] of regions.
  constructor(element, width, height, grid) {
    this.#element = element;
    this.#image = element.querySelector("img");
    this.#canvas = element.querySelector("canvas");
    this.#context = this.#canvas.getContext("2d");
    this.#grid = grid;
    const scale = Math.min(1, MAX_CANVAS_SIZE / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(scale * width));
    this.#canvas.height = Math.max(1, Math.round(scale * height));
    this.#mask.width = this.#mask.height = MASK_SIZE;
    this.#maskContext = this.#mask.getContext("2d");
    this.#maskPixels = this.#maskContext.createImageData(MASK_SIZE, MASK_SIZE);
    element.style.setProperty("--dimmed-brightness", DIMMED_BRIGHTNESS);
  }

  // Show the attention of a word: base64 of a byte per region, in row-major order.
  show(encodedLevels) {
    const levels = Uint8Array.from(atob(encodedLevels), (byte) => byte.charCodeAt(0));
    this.#target = smoothLevels(levels, this.#grid);
    this.#element.classList.add("active");
    if (this.#frame) return;
    this.#previousTime = performance.now();
    this.#draw(this.#previousTime);
  }

  // Show the image without attention. The canvas keeps its content while it fades out.
  hide() {
    this.#element.classList.remove("active");
  }

  close() {
    cancelAnimationFrame(this.#frame);
    this.hide();
  }

  #draw(time) {
    this.#frame = 0;
    if (!this.#image.complete) {
      this.#frame = requestAnimationFrame((next) => this.#draw(next));
      return;
    }
    const reducesMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const elapsed = Math.max(0, time - this.#previousTime);
    const step = reducesMotion ? 1 : 1 - 0.5 ** (elapsed / FADE_HALF_LIFE);
    this.#previousTime = time;
    let distance = 0;
    for (let i = 0; i < this.#current.length; i += 1) {
      this.#current[i] += step * (this.#target[i] - this.#current[i]);
      distance = Math.max(distance, Math.abs(this.#target[i] - this.#current[i]));
      this.#maskPixels.data[4 * i + 3] = 255 * this.#current[i];
    }
    this.#paint();
    // Half a level of 255.
    if (distance > 1 / 512) this.#frame = requestAnimationFrame((next) => this.#draw(next));
  }

  // Paint the glowing image and cut it out by the mask. Below the canvas lies the dimmed image.
  #paint() {
    const { width, height } = this.#canvas;
    const context = this.#context;
    if (!this.#image.naturalWidth) return; // a broken image cannot be drawn
    this.#maskContext.putImageData(this.#maskPixels, 0, 0);
    context.globalCompositeOperation = "copy";
    context.drawImage(this.#image, 0, 0, width, height);
    context.globalCompositeOperation = "screen";
    context.fillStyle = `rgb(${GLOW.join(" ")})`;
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-in";
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#mask, 0, 0, width, height);
  }
}

// Interpolate levels [rows * columns] by cubic B-splines to a mask [MASK_SIZE * MASK_SIZE], scaled so that its maximum
// is 1. B-splines are smooth and never overshoot, so a single attended region becomes a soft round spot.
function smoothLevels(levels, [rows, columns]) {
  const columnWeights = splineWeights(columns);
  const stretched = new Float32Array(rows * MASK_SIZE);
  for (let row = 0; row < rows; row += 1)
    for (let x = 0; x < MASK_SIZE; x += 1)
      for (const [column, weight] of columnWeights[x])
        stretched[row * MASK_SIZE + x] += weight * levels[row * columns + column];
  const rowWeights = splineWeights(rows);
  const mask = new Float32Array(MASK_SIZE * MASK_SIZE);
  for (let y = 0; y < MASK_SIZE; y += 1)
    for (const [row, weight] of rowWeights[y])
      for (let x = 0; x < MASK_SIZE; x += 1) mask[y * MASK_SIZE + x] += weight * stretched[row * MASK_SIZE + x];
  const max = mask.reduce((a, b) => Math.max(a, b), 1e-9);
  return mask.map((value) => value / max);
}

// For each of MASK_SIZE pixels along one side: pairs [region, weight] of the four nearest of `numRegions` regions.
// Beyond the border, the region at the border repeats.
function splineWeights(numRegions) {
  const kernel = (distance) => {
    const t = Math.abs(distance);
    return t < 1 ? 2 / 3 - t ** 2 + t ** 3 / 2 : (2 - t) ** 3 / 6;
  };
  return Array.from({ length: MASK_SIZE }, (_, pixel) => {
    const center = ((pixel + 0.5) * numRegions) / MASK_SIZE - 0.5;
    const first = Math.floor(center) - 1;
    return [first, first + 1, first + 2, first + 3].map((region) => [
      Math.min(numRegions - 1, Math.max(0, region)),
      kernel(center - region),
    ]);
  });
}

// Format the weight of the visual sentinel, 0 to 1; decoders without a sentinel have weight 0.
function sentinelLabel(weight) {
  const percent = Math.round(100 * weight);
  return percent ? `sentinel ${percent}%` : "";
}

// Tracks which word of the captions of an image is active. Pointing at a word activates it. Clicking it, tapping it or
// moving to it with the arrow keys focuses it, and the focused word stays active. Escape removes the focus.
//
// A caption is a `.caption-words` toolbar of `.word` buttons.
class WordSelection {
  #onChange;
  #focused = null;
  #active = null;
  #listeners = new AbortController();

  // onChange: called with the button of the word that becomes active, or with null.
  constructor(onChange) {
    this.#onChange = onChange;
  }

  addCaption(toolbar) {
    const words = [...toolbar.querySelectorAll(".word")];
    const listen = (type, listener) => toolbar.addEventListener(type, listener, { signal: this.#listeners.signal });
    const focus = (word) => {
      this.#focused = word;
      makeTabbable(words, word ?? words[0]);
      this.activate(word);
    };
    makeTabbable(words, words[0]);
    // The target of a touch stays the word where the touch began, so look up the word under the finger.
    listen("pointermove", (event) => {
      const word = toolbar.getRootNode().elementFromPoint(event.clientX, event.clientY)?.closest(".word");
      if (words.includes(word)) this.activate(word);
    });
    listen("pointerleave", () => this.activate(this.#focused));
    listen("click", (event) => event.target.closest(".word")?.focus()); // Safari does not focus clicked buttons
    listen("focusin", (event) => focus(event.target.closest(".word")));
    listen("focusout", () => focus(null));
    listen("keydown", (event) => {
      const index = words.indexOf(event.target);
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: words.length - 1 }[event.key];
      if (event.key === "Escape") event.target.blur();
      if (next === undefined) return;
      event.preventDefault();
      words[Math.min(Math.max(next, 0), words.length - 1)].focus();
    });
  }

  activate(word) {
    if (word === this.#active) return;
    this.#active?.setAttribute("aria-pressed", "false");
    word?.setAttribute("aria-pressed", "true");
    this.#active = word;
    this.#onChange(word);
  }

  clear() {
    this.#focused?.blur();
    this.activate(null);
  }

  close() {
    this.#listeners.abort();
  }
}

// Make one word of a caption the only tab stop. The arrow keys move to the other words.
function makeTabbable(words, tabStop) {
  for (const word of words) word.tabIndex = word === tabStop ? 0 : -1;
}
