"""The report: one page that tells a run's results, and shows for each word of a caption where the captioner looked.

The page needs nothing beside itself: pictures, maps of attention, curves, style and script are in it. It holds no date,
path or name of a host, so the same run gives the same bytes.
"""

import base64
import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from pipeline import __version__
from pipeline.artifacts import write_atomically
from pipeline.features.images import Pixels
from pipeline.metrics.grounding import Box
from pipeline.report import svg_charts as charts
from pipeline.report.examples import Choice, Example
from pipeline.report.overlay import attention_levels, encode_levels, overlay_css, overlay_js, page_file

PACKAGES = ("torch", "torchvision", "numpy")
"""Whose versions decide what a run gives."""
TITLES: dict[Choice, str] = {"best": "Captioned best", "worst": "Captioned worst", "random": "Drawn at random"}
PLACES = {"root", "weights"}
"""Settings that may be paths, of which the page shows the last part alone."""
QUALITY = 88
"""Of the pictures, as JPEG counts it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page tells."""

    split: str
    examples: Sequence[Example]
    scores: Mapping[str, Any]
    """As in `scores.json`."""
    captions: Mapping[str, Any]
    """As in `captions.json`."""
    teacher_forcing: Mapping[str, Any]
    """As in `teacher_forcing.json`."""
    scenes: Mapping[str, Any]
    """As in `scenes.json`."""
    history: Sequence[Mapping[str, Any]]
    """A row for each epoch, as in `history.json`."""
    params: Mapping[str, Any]
    """Sections of the params file, as plain values."""


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A word of a caption, as the page's script reads it."""

    text: str
    map: str
    """Base64 of a byte for each region, by rows; 255 is the region of most attention."""
    peak: float
    """Attention of that region."""
    boxes: str
    """JSON list of boxes."""


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.from_string(page_file("page.html")).render(
        report=report,
        style=Markup(overlay_css() + page_file("page.css")),
        script=Markup(overlay_js() + page_file("page.js")),
        groups=[
            (TITLES[choice], [_shown(example) for example in examples])
            for choice, examples in groupby(report.examples, key=lambda example: example.choice)
        ],
        scores=_scores(report.scores),
        layout=charts,
        params={name: list(_flat(values)) for name, values in report.params.items()},
        versions=_versions(),
    )
    write_atomically(path, page)


def _shown(example: Example) -> dict[str, Any]:
    height, width = example.picture.shape[:2]
    return {
        "picture": _data_uri(example.picture),
        "width": width,
        "height": height,
        "grid": example.attention.shape[1:],
        "caption": " ".join(example.words),
        "words": [
            _word(text, attention, example.boxes.get(place, ()))
            for place, (text, attention) in enumerate(zip(example.words, example.attention, strict=True))
        ],
        "references": example.references,
        "scores": example.scores,
        "image_id": example.image_id,
    }


def _data_uri(picture: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _word(text: str, attention: npt.NDArray[np.floating], boxes: Sequence[Box]) -> _Word:
    return _Word(
        text=text,
        map=encode_levels(attention_levels(attention)),
        peak=float(attention.max()),
        boxes=json.dumps([[round(edge, 4) for edge in box] for box in boxes]),
    )


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The table of scores: columns of images, rows of metrics, and each protocol with the metrics that share it."""
    subsets = scores.get("subsets", {})
    columns = {"all": (scores, scores["intervals"])}
    columns |= {name: (part, scores["intervals"]["subsets"][name]) for name, part in subsets.items()}
    metrics = [name for name in scores["protocol"] if name in scores["intervals"]]
    sharing: dict[tuple[str, ...], list[str]] = {}
    for name, lines in scores["protocol"].items():
        sharing.setdefault(tuple(lines), []).append(name)
    return {
        "columns": [(name, values["images"]) for name, (values, _) in columns.items()],
        "rows": [
            (name, [(values.get(name), intervals.get(name)) for values, intervals in columns.values()])
            for name in metrics
        ],
        "protocols": [(", ".join(names), lines) for lines, names in sharing.items()],
        "unavailable": scores["unavailable"],
    }


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, str):
            yield f"{above}{key}", Path(value).name if key in PLACES else value
        else:
            yield f"{above}{key}", json.dumps(value)


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"gridcap": __version__, "python": platform.python_version(), **packages}
