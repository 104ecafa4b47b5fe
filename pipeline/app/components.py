"""What Streamlit lacks: a picture whose caption points back at it, and samples beside what the clipboard holds.

Their scripts run in the page, so that pointing at a word asks the server nothing. They set texts, never markup: what a
caption or the name of a file holds is shown, not run.
"""

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from pipeline.app.uploads import MAX_BYTES, Preview
from pipeline.generation.caption import Caption


def _declared(name: str) -> Callable[..., Any]:
    html, css, js = (Path(__file__).with_name(f"{name}.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    return st.components.v2.component(f"gridcap.{name}", html=html, css=css, js=js)


_viewer = _declared("viewer")
_picker = _declared("picker")


def show_caption(preview: Preview, caption: Caption, key: str) -> None:
    """Show a picture under its caption and the alternatives to it; pointing at a word lights what it was read from."""
    captions = [caption, *caption.alternatives]
    assert caption.attention is not None
    _viewer(
        data={
            "image": as_url(preview.jpeg),
            "width": preview.width,
            "height": preview.height,
            "grid": caption.attention.shape[1:],
            "captions": [_told(one) for one in captions],
        },
        key=key,
    )


def pick(samples: Sequence[bytes], take_sample: Callable[[int], None], take_file: Callable[[str, bytes], None]) -> None:
    """Show small JPEGs to choose from, and take a picture from the clipboard; calls back before the page runs again."""

    def picked() -> None:
        value = st.session_state["picker"]["picked"]
        if "sample" in value:
            take_sample(int(value["sample"]))
        else:
            take_file(str(value["name"]), base64.b64decode(value["content"]))

    _picker(
        data={"samples": [as_url(jpeg) for jpeg in samples], "most": MAX_BYTES},
        key="picker",
        on_picked_change=picked,
    )


def literal(text: str) -> str:
    """Escape a text where Streamlit expects Markdown, so that it shows as it stands: files are named as people like."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def as_url(jpeg: bytes) -> str:
    """Put a JPEG into the text of its address."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _told(caption: Caption) -> dict[str, Any]:
    assert caption.attention is not None
    strongest = caption.attention.max(axis=(1, 2), keepdims=True)
    light = np.rint(255 * caption.attention / np.maximum(strongest, np.finfo(np.float32).tiny)).astype(int)
    return {
        "confidence": caption.confidence,
        "score": caption.score,
        "words": [
            {"text": word, "probability": probability, "light": values.ravel().tolist()}
            for word, probability, values in zip(caption.words, caption.word_probabilities, light, strict=True)
        ],
    }
