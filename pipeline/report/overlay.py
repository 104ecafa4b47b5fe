"""Attention overlay: how the report, the app and the plots show where the decoder attends for a word.

Where the decoder attends, the image keeps its colors and glows. Elsewhere it is gray and dimmed. `page/overlay.js` and
`page/overlay.css` draw the overlay in the browser, for the report and the app. `figures.py` draws it in attention
plots.

Legend: `H` x `W` grid of regions.
"""

import base64
from importlib.resources import files

import numpy as np
import numpy.typing as npt

DIMMED_BRIGHTNESS = 0.4
"""Brightness of the gray image where there is no attention, relative to the original."""
GLOW = (0.40, 0.32, 0.14)
"""Color of black pixels at full attention (red, green and blue in 0 to 1): attention is visible on dark objects too."""


def attention_levels(attention: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Quantize the attention of each word to a byte per region.

    Args:
        attention: Attention weights [..., H, W].

    Returns:
        Levels, uint8 [..., H, W]; 255 is the most attended region of each word.
    """
    weights = attention.astype(np.float64)
    peaks = np.maximum(weights.max(axis=(-2, -1), keepdims=True), np.finfo(np.float64).tiny)
    levels: npt.NDArray[np.uint8] = (255 * weights / peaks).round().astype(np.uint8)
    return levels


def sentinel_weights(attention: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the weight of the visual sentinel for each word: what the attention weights of the regions lack of 1.

    It is 0, up to rounding, for decoders without a sentinel.

    Args:
        attention: Attention weights [T, H, W].

    Returns:
        Weights [T], 0 to 1.
    """
    weights: npt.NDArray[np.float64] = (1 - attention.astype(np.float64).sum(axis=(-2, -1))).clip(0, 1)
    return weights


def sentinel_label(weight: float) -> str:
    """Format the weight of the sentinel as `overlay.js` does: `sentinel 62%`, or nothing below half a percent."""
    percent = round(100 * weight)
    return f"sentinel {percent}%" if percent else ""


def encode_levels(levels: npt.NDArray[np.uint8]) -> str:
    """Encode levels, uint8 [H, W], for `overlay.js`: base64 of a byte per region, in row-major order."""
    return base64.b64encode(levels.tobytes()).decode()


def jpeg_url(jpeg: bytes) -> str:
    """Encode a JPEG as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def overlay_css() -> str:
    """Return the style sheet of the overlay and of the words that control it."""
    return page_file("overlay.css")


def overlay_js() -> str:
    """Return the script of the overlay, which starts with the constants of this module."""
    return (
        f"const DIMMED_BRIGHTNESS = {DIMMED_BRIGHTNESS};\n"
        f"const GLOW = [{', '.join(str(round(255 * channel)) for channel in GLOW)}]; // red, green, blue\n"
        f"{page_file('overlay.js')}"
    )


def page_file(name: str) -> str:
    """Read a file of `pipeline/report/page`."""
    return (files("pipeline.report") / "page" / name).read_text(encoding="utf-8")
