// Sample pictures to choose from, and pictures pasted from the clipboard, which come as
// {name, content: base64}; a sample comes as {sample: its number}.
//
// data: {samples: [URL], most: bytes of a picture}

const views = new WeakMap();

export default function ({ data, parentElement, setTriggerValue }) {
  views.get(parentElement)?.();
  const paste = parentElement.querySelector(".paste");
  const samples = parentElement.querySelector(".samples");
  const note = parentElement.querySelector(".note");

  const take = (blob) => {
    if (blob.size > data.most) {
      note.textContent = `That picture has ${(blob.size / 2 ** 20).toFixed(0)} MB; the most is ${data.most / 2 ** 20} MB.`;
      return;
    }
    note.textContent = "";
    const reader = new FileReader();
    reader.onload = () =>
      setTriggerValue("picked", {
        name: blob.name ?? "pasted picture",
        content: reader.result.slice(reader.result.indexOf(",") + 1),
      });
    reader.readAsDataURL(blob);
  };

  const onPaste = (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      take(file);
    } else if (!event.target.closest?.("input, textarea")) {
      note.textContent = "There is no picture in the clipboard.";
    }
  };
  document.addEventListener("paste", onPaste);

  paste.onclick = async () => {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((one) => one.startsWith("image/"));
        if (type) return take(await item.getType(type));
      }
      note.textContent = "There is no picture in the clipboard.";
    } catch {
      note.textContent = "The browser keeps its clipboard to itself; press Ctrl+V (on a Mac ⌘V).";
    }
  };

  samples.replaceChildren(
    ...data.samples.map((url, number) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.setAttribute("aria-label", `Sample ${number + 1}`);
      image.src = url;
      image.alt = "";
      button.onclick = () => setTriggerValue("picked", { sample: number });
      button.append(image);
      return button;
    }),
  );

  const close = () => document.removeEventListener("paste", onPaste);
  views.set(parentElement, close);
  return close;
}
