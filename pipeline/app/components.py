"""Custom Streamlit components: the caption viewer and the image picker.

Their scripts run in the browser, so pointing at a word sends nothing to the server. They set text, never HTML, so
markup in captions and file names is not interpreted.
"""

import base64
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from pipeline.app.uploads import MAX_BYTES, Preview
from pipeline.generation.caption import Caption
from pipeline.report.overlay import attention_levels, encode_levels, jpeg_url, overlay_css, overlay_js, sentinel_weights


def _declare(name: str, shared_css: str = "", shared_js: str = "") -> Callable[..., Any]:
    """Declare a component.

    Args:
        name: Name of its files in this folder, without the suffixes .html, .css and .js.
        shared_css: Style sheet to put before that of the component.
        shared_js: Script to put before that of the component.
    """
    html, css, js = (
        Path(__file__).with_name(f"{name}.{suffix}").read_text("utf-8") for suffix in ("html", "css", "js")
    )
    return st.components.v2.component(f"gridcap.{name}", html=html, css=shared_css + css, js=shared_js + js)


_caption_viewer = _declare("caption_viewer", overlay_css(), overlay_js())
_image_picker = _declare("image_picker")


def show_caption(preview: Preview, caption: Caption, key: str) -> None:
    """Show an image with its caption and alternatives. Pointing at a word shows where the decoder attends.

    Args:
        preview: The image.
        caption: Its best caption, with alternatives. All of them have attention.
        key: Key of the component, unique among the viewers of the page.
    """
    assert caption.attention is not None, "a captioner's captions have attention"
    _caption_viewer(
        data={
            "image": jpeg_url(preview.jpeg),
            "width": preview.width,
            "height": preview.height,
            "grid": caption.attention.shape[1:],
            "captions": [_caption_data(ranked) for ranked in (caption, *caption.alternatives)],
        },
        key=key,
    )


def pick_image(
    thumbnails: Sequence[bytes], on_sample: Callable[[int], None], on_paste: Callable[[str, bytes], None]
) -> None:
    """Show sample images to choose from, and accept an image from the clipboard.

    Streamlit runs the callbacks before it runs the page again.

    Args:
        thumbnails: The samples, as small JPEGs.
        on_sample: Called with the index of the chosen sample.
        on_paste: Called with the name and the content of the pasted image file.
    """

    def on_picked() -> None:
        picked = st.session_state["image_picker"]["picked"]
        if "sample" in picked:
            on_sample(int(picked["sample"]))
        else:
            on_paste(str(picked["name"]), base64.b64decode(picked["content"]))

    _image_picker(
        data={"samples": [jpeg_url(jpeg) for jpeg in thumbnails], "max_bytes": MAX_BYTES},
        key="image_picker",
        on_picked_change=on_picked,
    )


def escape_markdown(text: str) -> str:
    """Escape a text, such as a file name, for Streamlit's Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _caption_data(caption: Caption) -> dict[str, Any]:
    """Describe a caption as `caption_viewer.js` reads it."""
    assert caption.attention is not None, "a captioner's captions have attention"
    maps = map(encode_levels, attention_levels(caption.attention))
    sentinels = sentinel_weights(caption.attention).tolist()
    return {
        "confidence": caption.confidence,
        "score": caption.score,
        "words": [
            {"text": word, "probability": probability, "map": attention_map, "sentinel": sentinel}
            for word, probability, attention_map, sentinel in zip(
                caption.words, caption.word_probabilities, maps, sentinels, strict=True
            )
        ],
    }
