// An image with its captions. While a word is active, the overlay shows where the decoder attends.
//
// data: {image: URL, width, height, grid: [rows, columns], captions: [{confidence, score, words: [{text, probability,
// map, sentinel}]}]}, best caption first. `map` is the attention of the word, as `AttentionOverlay.show` reads it;
// `sentinel` is the weight of the visual sentinel.
//
// pipeline/app/components.py puts pipeline/report/page/overlay.js before this script.

const PLAY_INTERVAL = 750; // ms per word

const HINT = `${matchMedia("(hover: none)").matches ? "Tap" : "Point at"} a word to see where the model attends.`;

const views = new WeakMap(); // by parentElement; Streamlit calls the component again for each change of data

export default function ({ data, parentElement }) {
  views.get(parentElement)?.close();
  const view = showCaptions(parentElement.querySelector(".viewer"), data);
  views.set(parentElement, view);
  return () => view.close();
}

function showCaptions(root, data) {
  const imageFrame = root.querySelector(".attention-overlay");
  const image = imageFrame.querySelector("img");
  const status = root.querySelector(".status");
  const [best, ...alternatives] = data.captions;

  imageFrame.style.aspectRatio = `${data.width} / ${data.height}`;
  image.src = data.image;
  image.alt = best.words.map((word) => word.text).join(" ");

  const wordOfButton = new Map();
  const showWord = (button) => {
    const word = wordOfButton.get(button);
    const facts = word ? [word.text, percent(word.probability), sentinelLabel(word.sentinel)] : [HINT];
    status.textContent = facts.filter(Boolean).join(" · ");
    if (word) overlay.show(word.map);
    else overlay.hide();
  };
  const overlay = new AttentionOverlay(imageFrame, data.width, data.height, data.grid);
  const selection = new WordSelection(showWord);
  showWord(null);

  const showWords = (toolbar, words) => {
    const buttons = words.map((word) => {
      const button = wordButton(word);
      wordOfButton.set(button, word);
      button.onpointermove = button.onfocus = () => player.stop();
      return button;
    });
    toolbar.replaceChildren(...buttons.flatMap((button) => [button, " "]));
    selection.addCaption(toolbar);
    return buttons;
  };
  const bestButtons = showWords(root.querySelector(".caption"), best.words);
  if (best.words.length === 0) root.querySelector(".caption").textContent = "(no words)";
  root.querySelector(".meter span").style.width = percent(best.confidence);
  root.querySelector(".confidence b").textContent = percent(best.confidence);

  const list = root.querySelector("ol");
  list.parentElement.hidden = alternatives.length === 0;
  list.replaceChildren(
    ...alternatives.map((caption) => {
      const item = document.createElement("li");
      const toolbar = document.createElement("span");
      toolbar.className = "caption-words";
      toolbar.setAttribute("role", "toolbar");
      toolbar.setAttribute("aria-label", "Words of an alternative caption");
      showWords(toolbar, caption.words);
      const score = document.createElement("span");
      score.className = "score";
      score.textContent = `${percent(caption.confidence)} · ${caption.score.toFixed(2)}`;
      item.replaceChildren(toolbar, score);
      return item;
    }),
  );

  const player = playWords(root.querySelector(".play"), bestButtons, selection);
  imageFrame.onclick = () => {
    player.stop();
    selection.clear();
  };
  return {
    close: () => {
      player.stop();
      selection.close();
      overlay.close();
    },
  };
}

function wordButton(word) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "word";
  button.textContent = word.text;
  button.setAttribute("aria-label", `${word.text}, ${percent(word.probability)}`);
  button.setAttribute("aria-pressed", "false");
  button.style.setProperty("--probability", word.probability.toFixed(3));
  return button;
}

// Make the button start and stop playback, which activates one word after the other.
function playWords(button, words, selection) {
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "▶";
  };
  button.disabled = words.length === 0;
  button.onclick = () => {
    if (timer) {
      stop();
      return selection.activate(null);
    }
    let index = 0;
    const next = () => {
      if (index === words.length) stop();
      selection.activate(words[index] ?? null);
      index += 1;
    };
    timer = setInterval(next, PLAY_INTERVAL);
    button.textContent = "■";
    next();
  };
  stop();
  return { stop };
}

function percent(fraction) {
  return `${Math.round(100 * fraction)}%`;
}
