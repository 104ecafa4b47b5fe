"""Output of `gridcap predict`: captions as text or JSON lines, and drawings of the attention."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError, printable, write_error
from pipeline.features.images import read_visible
from pipeline.generation.caption import Caption
from pipeline.generation.search import SearchParams
from pipeline.prediction.captioner import Captioner
from pipeline.prediction.inputs import NamedImage

DRAWING_SIZE = 320
"""Longer side, in px, of the image in a drawing."""

_MIN_PROGRESS_IMAGES = 21
"""Minimum number of images for a progress bar."""


def predict(
    captioner: Captioner,
    inputs: Sequence[NamedImage],
    search: SearchParams,
    as_json: bool,
    drawings: Sequence[Path] | None,
) -> int:
    """Caption images and print each caption as soon as it is generated. Errors are printed to standard error.

    Args:
        captioner: Captioner of the images.
        inputs: Images to caption.
        search: Search settings.
        as_json: Print one JSON object per image instead of text.
        drawings: File for the attention drawing of each image, from `drawing_paths`; None for no drawings.

    Returns:
        The number of images that could not be read.

    Raises:
        UserError: A drawing cannot be written.
    """
    num_failed = 0
    disable = True if len(inputs) < _MIN_PROGRESS_IMAGES else None  # None shows the bar on a terminal only
    with tqdm(total=len(inputs), desc="predict", unit="image", disable=disable) as bar:
        results = captioner.stream((image.source for image in inputs), search, [image.name for image in inputs])
        for index, (image, result) in enumerate(zip(inputs, results, strict=True)):
            if isinstance(result, UserError):
                num_failed += 1
                bar.write(f"error: {printable(str(result))}", file=sys.stderr)
            else:
                lines = [json_line(image, result)] if as_json else text_lines(image, result)
                bar.write("\n".join(lines), file=sys.stdout)
                if drawings is not None:
                    draw_attention(captioner, image, result, drawings[index])
            bar.update()
    return num_failed


def json_line(image: NamedImage, caption: Caption) -> str:
    """Format a caption as a JSON object. Alternatives have the same keys without `image` and `alternatives`."""
    row = {
        "image": image.name,
        **_json_fields(caption),
        "alternatives": [_json_fields(alternative) for alternative in caption.alternatives],
    }
    # ASCII, since file names may not be valid UTF-8.
    return json.dumps(row, allow_nan=False)


def _json_fields(caption: Caption) -> dict[str, Any]:
    return {
        "caption": caption.text,
        "confidence": caption.confidence,
        "log_probability": caption.log_probability,
        "score": caption.score,
        "words": list(caption.words),
        "word_probabilities": list(caption.word_probabilities),
    }


def text_lines(image: NamedImage, caption: Caption) -> list[str]:
    """Format a caption as `NAME: CAPTION  (CONFIDENCE)`, with its alternatives on indented lines below."""
    name = printable(image.name)
    lines = [f"{name}: {printable(caption.text)}  ({caption.confidence:.2f})"]
    lines += [f"{'':>{len(name)}}  {printable(other.text)}  ({other.confidence:.2f})" for other in caption.alternatives]
    return lines


def drawing_paths(inputs: Sequence[NamedImage], target: Path) -> list[Path]:
    """Choose the file for the attention drawing of each image.

    Args:
        inputs: Images to caption.
        target: A .png or .svg file for a single image, which is overwritten; or a folder, in which images of equal name
            are numbered: `a.png`, `a-2.png`.

    Raises:
        UserError: There are several images for one file, the file is the image itself, or a file in the folder exists.
    """
    suffix = target.suffix.lower()
    if suffix not in (".png", ".svg"):
        if suffix in Image.registered_extensions():
            raise UserError(f"{target}: attention is drawn as PNG or SVG. Name a .png or .svg file, or a folder.")
        return list(_paths_in_folder(inputs, target))
    if len(inputs) > 1:
        raise UserError(f"{target}: is a single file, but there are {len(inputs)} images. Name a folder.")
    source = inputs[0].source
    if isinstance(source, Path) and target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"{target}: is the image itself. Name another file.")
    return [target]


def _paths_in_folder(inputs: Sequence[NamedImage], folder: Path) -> Iterator[Path]:
    used: set[Path] = set()
    for image in inputs:
        stem = "standard-input" if isinstance(image.source, bytes) else image.source.stem
        names = itertools.chain([stem], (f"{stem}-{index}" for index in itertools.count(2)))
        path = next(path for name in names if (path := folder / f"{name}.png") not in used)
        if path.exists():
            raise UserError(f"{path}: already exists. Remove it, or name another folder.")
        used.add(path)
        yield path


def draw_attention(captioner: Captioner, image: NamedImage, caption: Caption, path: Path) -> None:
    """Draw the attention of each word of a caption over the image, as a PNG or SVG file.

    Raises:
        UserError: The file cannot be written.
    """
    from pipeline.report.figures import attention_strip  # imported here because Matplotlib takes half a second

    assert caption.attention is not None, "a captioner returns captions with attention"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoder, view = captioner.config.encoder, captioner.config.view
        visible = read_visible(image.source, DRAWING_SIZE, encoder.frame, view, image.name)
        attention_strip(visible, caption.words, caption.attention, path)
    except OSError as error:
        raise write_error(error, path, "Name another file or folder.") from error
