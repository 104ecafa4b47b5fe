"""What `gridcap predict` and `gridcap attend` do: captions of the pictures named, for people or for programs."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.features.images import Pixels, View, read_upright, read_views
from pipeline.generation.search import SearchParams
from pipeline.prediction.captioner import Caption, Captioner
from pipeline.prediction.inputs import Input
from pipeline.report.figures import attention_strip

STRIP_SIDE = 320
"""Longer side in px of the picture in a strip."""

_FEW = 20
"""Pictures for which no progress is shown."""


def predict(
    captioner: Captioner, inputs: Sequence[Input], search: SearchParams, as_json: bool, attention: Path | None
) -> int:
    """Print the captions of pictures as they are found; returns how many pictures could not be read.

    What is wrong with those is printed to standard error. For people, a line is a caption behind its picture and its
    confidence, with other captions indented below; for programs it is an object, as `described` says. `attention` is a
    folder for strips of attention. Raises `UserError` where one of them would take the place of a file.
    """
    strips = _strips(inputs, attention) if attention else []
    failed = 0
    with tqdm(total=len(inputs), desc="predict", unit="image", disable=None if len(inputs) > _FEW else True) as bar:
        found = captioner.stream((one.source for one in inputs), search, [one.name for one in inputs])
        for number, (one, caption) in enumerate(zip(inputs, found, strict=True)):
            if isinstance(caption, UserError):
                failed += 1
                bar.write(f"error: {caption}", file=sys.stderr)
            else:
                bar.write("\n".join(_lines(one, caption, as_json)), file=sys.stdout)
                if strips:
                    draw(captioner, one, caption, strips[number])
            bar.update()
    return failed


def described(one: Input, caption: Caption) -> dict[str, Any]:
    """Describe a picture's caption for programs; `alternatives` are described alike, but for `image`."""
    return {
        "image": one.name,
        **_plain(caption),
        "alternatives": [_plain(alternative) for alternative in caption.alternatives],
    }


def draw(captioner: Captioner, one: Input, caption: Caption, path: Path) -> None:
    """Draw the strip of a caption's words, each over the picture lit where the decoder looked, as a PNG or SVG file.

    Raises `UserError` where the file cannot be written, or is the picture.
    """
    if isinstance(one.source, Path) and path.exists() and path.samefile(one.source):
        raise UserError(f"{path}: is the picture itself; name another file for the strip")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        attention_strip(_shown(captioner, one), caption.words, caption.attention, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place for the strip") from error


def _plain(caption: Caption) -> dict[str, Any]:
    return {
        "caption": caption.text,
        "confidence": caption.confidence,
        "log_probability": caption.log_probability,
        "score": caption.score,
        "words": list(caption.words),
        "word_probabilities": list(caption.word_probabilities),
    }


def _lines(one: Input, caption: Caption, as_json: bool) -> Iterator[str]:
    if as_json:
        # In ASCII, since names of files may be no text.
        yield json.dumps(described(one, caption), allow_nan=False)
        return
    name = "".join(character if character.isprintable() else "?" for character in one.name)
    yield f"{name}: {caption.text}  ({caption.confidence:.2f})"
    for alternative in caption.alternatives:
        yield f"{'':>{len(name)}}  {alternative.text}  ({alternative.confidence:.2f})"


def _shown(captioner: Captioner, one: Input) -> Pixels:
    """The part of the picture that the grid covers, in its own proportions where it is the whole."""
    view = cast(View, captioner.config.view)
    if view == "whole":
        return read_upright(one.source, STRIP_SIDE, one.name)
    return cast(Pixels, read_views(one.source, STRIP_SIDE, (view,), one.name)[0])


def _strips(inputs: Sequence[Input], folder: Path) -> list[Path]:
    """A file in the folder for each picture's strip, numbered where two would be the same."""
    strips: dict[Path, None] = {}
    for one in inputs:
        stem = "standard-input" if isinstance(one.source, bytes) else one.source.stem
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        path = next(path for name in names if (path := folder / f"{name}.png") not in strips)
        if path.exists():
            raise UserError(f"{path}: exists already; name a folder for the strips in which none of them is")
        strips[path] = None
    return list(strips)
