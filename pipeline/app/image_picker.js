// Sample images to choose from, and images pasted from the clipboard.
//
// data: {samples: [URL], max_bytes: limit of a pasted file}
// Trigger `picked`: {sample: index} or {name, content: base64}.

const NO_IMAGE = "There is no image in the clipboard.";

const closeListeners = new WeakMap(); // by parentElement; Streamlit calls the component again for each change of data

export default function ({ data, parentElement, setTriggerValue }) {
  closeListeners.get(parentElement)?.();
  const pasteButton = parentElement.querySelector(".paste");
  const samples = parentElement.querySelector(".samples");
  const status = parentElement.querySelector(".status");

  const send = (file) => {
    if (file.size > data.max_bytes) {
      const size = (file.size / 2 ** 20).toFixed(1);
      status.textContent = `${size} MB is over the limit of ${data.max_bytes / 2 ** 20} MB. Use a smaller image.`;
      return;
    }
    status.textContent = "";
    const reader = new FileReader();
    reader.onload = () =>
      setTriggerValue("picked", {
        name: file.name ?? "pasted image",
        content: reader.result.slice(reader.result.indexOf(",") + 1), // after "data:image/png;base64,"
      });
    reader.readAsDataURL(file);
  };

  const onPaste = (event) => {
    const file = [...event.clipboardData.files].find((candidate) => candidate.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      send(file);
    } else if (!event.target.closest?.("input, textarea")) {
      status.textContent = NO_IMAGE;
    }
  };
  document.addEventListener("paste", onPaste);

  pasteButton.onclick = async () => {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((candidate) => candidate.startsWith("image/"));
        if (type) return send(await item.getType(type));
      }
      status.textContent = NO_IMAGE;
    } catch {
      status.textContent = "The browser denies access to the clipboard. Press Ctrl+V (⌘V on a Mac) instead.";
    }
  };

  samples.replaceChildren(
    ...data.samples.map((url, index) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.setAttribute("aria-label", `Sample ${index + 1}`);
      image.src = url;
      image.alt = "";
      button.onclick = () => setTriggerValue("picked", { sample: index });
      button.append(image);
      return button;
    }),
  );

  const close = () => document.removeEventListener("paste", onPaste);
  closeListeners.set(parentElement, close);
  return close;
}
