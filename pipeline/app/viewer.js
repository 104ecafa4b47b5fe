// A picture under its captions: pointing at a word lights what the captioner looked at for it.
//
// data: {image: URL, width, height, grid: [rows, columns], captions: [{confidence, score, words: [{text, probability,
// light}]}]}, the best caption first; light is [rows * columns] from 0 to 255, by rows.

const SIDE = 128; // of the mask in px; the browser stretches it over the picture
const MOST_PX = 1024; // of the longer side of the canvas
const WARMTH = "rgb(102 82 36)"; // what full light adds to black: a dark thing would not show that it is lit
const HALF_LIFE = 60; // ms, of the way from one word's light to the next one's
const STEP = 750; // ms a word, when the words are gone through by themselves

const HINT = `${matchMedia("(hover: none)").matches ? "Touch" : "Point at"} a word to see where the model looked.`;

const views = new WeakMap();

export default function ({ data, parentElement }) {
  views.get(parentElement)?.close();
  const view = show(parentElement.querySelector(".viewer"), data);
  views.set(parentElement, view);
  return () => view.close();
}

function show(root, data) {
  const picture = root.querySelector(".picture");
  const image = picture.querySelector("img");
  const lamp = lampOf(picture.querySelector("canvas"), image, data);
  const note = root.querySelector(".note");
  const play = root.querySelector(".play");
  let pinned = null; // the word that stays lit when the pointer is elsewhere
  let timer = null;

  picture.style.aspectRatio = `${data.width} / ${data.height}`;
  image.src = data.image;
  image.alt = data.captions[0].words.map((word) => word.text).join(" ");

  const light = (button, word) => {
    for (const other of root.querySelectorAll(".word.lit")) other.classList.remove("lit");
    button?.classList.add("lit");
    root.classList.toggle("looking", button !== null);
    lamp.shine(word?.light ?? null);
    note.textContent = word ? `${word.text} · ${percent(word.probability)}` : HINT;
  };
  const rest = () => (pinned ? light(pinned.button, pinned.word) : light(null, null));
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
  };

  const sentence = (caption) => {
    const buttons = caption.words.map((word) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "word";
      button.textContent = word.text;
      button.setAttribute("aria-label", `${word.text}, ${percent(word.probability)}`);
      button.style.setProperty("--sure", word.probability.toFixed(3));
      button.onpointerenter = (event) => {
        if (event.pointerType === "mouse") stop(), light(button, word);
      };
      button.onpointerleave = (event) => event.pointerType === "mouse" && rest();
      button.onfocus = () => button.matches(":focus-visible") && light(button, word);
      button.onblur = rest;
      button.onclick = () => {
        stop();
        pinned = pinned?.button === button ? null : { button, word };
        rest();
      };
      button.onkeydown = (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) buttons[buttons.indexOf(button) + step]?.focus(), event.preventDefault();
        if (event.key === "Escape") (pinned = null), button.blur();
      };
      return button;
    });
    return buttons;
  };
  const spaced = (buttons) => buttons.flatMap((button) => [button, " "]);

  const [best, ...others] = data.captions;
  const words = sentence(best);
  root.querySelector(".caption").replaceChildren(...(words.length ? spaced(words) : ["(no words)"]));
  play.disabled = words.length === 0;
  root.querySelector(".meter span").style.width = percent(best.confidence);
  root.querySelector(".confidence b").textContent = percent(best.confidence);
  const list = root.querySelector("ol");
  list.parentElement.hidden = others.length === 0;
  list.replaceChildren(
    ...others.map((caption) => {
      const item = document.createElement("li");
      const text = document.createElement("span");
      text.replaceChildren(...spaced(sentence(caption)));
      const score = document.createElement("span");
      score.className = "score";
      score.textContent = `${percent(caption.confidence)} · ${caption.score.toFixed(2)}`;
      item.replaceChildren(text, score);
      return item;
    }),
  );

  play.onclick = () => {
    if (timer) return stop(), rest();
    let turn = 0;
    const next = () => {
      if (turn === words.length) return stop(), rest();
      light(words[turn], best.words[turn]);
      turn += 1;
    };
    pinned = null;
    timer = setInterval(next, STEP);
    play.textContent = "■";
    next();
  };
  picture.onclick = () => {
    pinned = null;
    stop();
    rest();
  };
  stop();
  rest();
  return {
    close: () => {
      stop();
      lamp.close();
    },
  };
}

// Draws the lit part of the picture; what lies under the canvas is the same picture, dimmed.
function lampOf(canvas, image, data) {
  const scale = Math.min(1, MOST_PX / Math.max(data.width, data.height));
  canvas.width = Math.max(1, Math.round(scale * data.width));
  canvas.height = Math.max(1, Math.round(scale * data.height));
  const pen = canvas.getContext("2d");
  const mask = document.createElement("canvas");
  mask.width = mask.height = SIDE;
  const maskPen = mask.getContext("2d");
  const pixels = maskPen.createImageData(SIDE, SIDE);
  const now = new Float32Array(SIDE * SIDE);
  let goal = null;
  let frame = 0;
  let before = 0;

  const draw = (time) => {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const share = still ? 1 : 1 - 0.5 ** ((time - before) / HALF_LIFE);
    before = time;
    let left = 0;
    for (let i = 0; i < now.length; i += 1) {
      now[i] += share * (goal[i] - now[i]);
      left = Math.max(left, Math.abs(goal[i] - now[i]));
      pixels.data[4 * i + 3] = 255 * now[i];
    }
    maskPen.putImageData(pixels, 0, 0);
    pen.globalCompositeOperation = "copy";
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "screen";
    pen.fillStyle = WARMTH;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "destination-in";
    pen.imageSmoothingQuality = "high";
    pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
    frame = left > 1 / 512 ? requestAnimationFrame(draw) : 0;
  };

  return {
    shine: (light) => {
      if (!light) return; // the canvas fades as it is
      if (!goal) now.fill(0);
      goal = smooth(light, data.grid);
      if (!frame) {
        before = performance.now();
        image.decode().then(() => (frame ||= requestAnimationFrame(draw)), () => {});
      }
    },
    close: () => cancelAnimationFrame(frame),
  };
}

// Grid of light [rows * columns] to the mask [SIDE * SIDE] from 0 to 1, 1 where it is brightest, by cubic B-splines: a
// lone bright region becomes a round spot without an edge.
function smooth(light, [rows, columns]) {
  const across = taps(columns);
  const wide = new Float32Array(rows * SIDE);
  for (let y = 0; y < rows; y += 1)
    for (let x = 0; x < SIDE; x += 1)
      for (const [place, weight] of across[x]) wide[y * SIDE + x] += weight * light[y * columns + place];
  const down = taps(rows);
  const full = new Float32Array(SIDE * SIDE);
  for (let y = 0; y < SIDE; y += 1)
    for (const [place, weight] of down[y])
      for (let x = 0; x < SIDE; x += 1) full[y * SIDE + x] += weight * wide[place * SIDE + x];
  const most = full.reduce((a, b) => Math.max(a, b), 1e-9);
  return full.map((value) => value / most);
}

// For each of SIDE places along a row of `count` regions: the regions that count there, with their weights.
function taps(count) {
  const kernel = (t) => {
    const a = Math.abs(t);
    return a < 1 ? 2 / 3 - a ** 2 + a ** 3 / 2 : (2 - a) ** 3 / 6;
  };
  return Array.from({ length: SIDE }, (_, i) => {
    const center = ((i + 0.5) * count) / SIDE - 0.5;
    const first = Math.floor(center) - 1;
    return [0, 1, 2, 3].map((n) => [
      Math.min(count - 1, Math.max(0, first + n)),
      kernel(center - first - n),
    ]);
  });
}

function percent(share) {
  return `${Math.round(100 * share)}%`;
}
