"""The report: one HTML page with the results of a run and the attention of each word of the example captions.

Images, attention maps, curves, style and script are inlined, so the page needs no other file and no network. It holds
no date, absolute path or host name: the same run gives the same bytes.
"""

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
from pipeline.captions.languages import join_words, word_separator
from pipeline.captions.records import SPLITS
from pipeline.evaluation.dataset_stats import DatasetStats, listed_leaks, split_rows, summary_rows
from pipeline.evaluation.evaluate import Analysis, EvaluateParams, EvaluationData, Scores
from pipeline.features.images import Pixels
from pipeline.metrics.caption_scores import CORPUS_SCORES
from pipeline.metrics.grounding import Box
from pipeline.report import svg_charts
from pipeline.report.curve_style import split_colors_css
from pipeline.report.examples import Example, ExampleGroup, Thumbnail, build_examples, build_thumbnails
from pipeline.report.overlay import (
    attention_levels,
    encode_levels,
    html_lang,
    jpeg_url,
    overlay_css,
    overlay_js,
    page_file,
    sentinel_weights,
)

PACKAGES = ("torch", "torchvision", "numpy")
"""Packages whose versions are shown, since they affect the results."""
GROUP_TITLES: dict[ExampleGroup, str] = {"best": "Best captions", "worst": "Worst captions", "random": "Random images"}
PATH_KEYS = {"root", "weights"}
"""Keys of params that are paths; the page shows only their last part."""
USAGE_TITLES = {
    "overused_words": "Words said too often",
    "underused_words": "Words said too rarely",
    "overused_phrases": "Phrases said too often",
    "repeated_words": "Words repeated in a caption",
    "number_words": "Number words",
}
"""Titles of the tables of words in `captions.json`."""
JPEG_QUALITY = 88
"""Quality of the images in the page, by Pillow's scale of 0 to 95."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Content of the page."""

    split: str
    """Split of the scored images."""
    examples: Sequence[Example]
    """Images to show, ordered by group."""
    thumbnails: Mapping[int, Thumbnail]
    """Images of the tables of words, by image id."""
    scores: Mapping[str, Any]
    """Content of `scores.json`."""
    captions: Mapping[str, Any]
    """Content of `captions.json`."""
    teacher_forcing: Mapping[str, Any]
    """Content of `teacher_forcing.json`."""
    scenes: Mapping[str, Any]
    """Content of `scenes.json`."""
    dataset: DatasetStats
    """Statistics of all splits."""
    history: Sequence[Mapping[str, Any]]
    """Training metrics of each epoch."""
    params: Mapping[str, Any]
    """Sections of the params file."""


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A word of a caption, for the script of the page."""

    text: str
    map: str
    """Attention, as `encode_levels` encodes it."""
    peak: float
    """Attention weight of the most attended region."""
    sentinel: float
    """Attention weight of the visual sentinel."""
    boxes: str
    """JSON list of the boxes of the objects that the word refers to."""


def build_report(
    data: EvaluationData,
    scores: Scores,
    analysis: Analysis,
    dataset: DatasetStats,
    params: EvaluateParams,
    all_params: Mapping[str, Any],
) -> Report:
    """Collect the content of the page.

    Args:
        data: Artifacts of the split.
        scores: Result of `score`.
        analysis: Result of `analyze`.
        dataset: Statistics of all splits.
        params: Settings of the evaluation.
        all_params: All sections of the params file.

    Raises:
        UserError: An example image is unreadable.
    """
    usage_image_ids = {row["image_id"] for name in USAGE_TITLES for row in analysis.captions["word_usage"][name]}
    return Report(
        split=data.split,
        examples=build_examples(data, scores.metrics, params.report, params.seed),
        thumbnails=build_thumbnails(data, usage_image_ids),
        scores=scores.summary,
        captions=analysis.captions,
        teacher_forcing=analysis.teacher_forcing,
        scenes=analysis.scenes,
        dataset=dataset,
        history=data.history,
        params=all_params,
    )


def write_report(path: Path, report: Report) -> None:
    """Write the page as one HTML file."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.from_string(page_file("page.html")).render(
        report=report,
        style=Markup(split_colors_css() + overlay_css() + page_file("page.css")),
        script=Markup(overlay_js() + page_file("page.js")),
        groups=[
            (GROUP_TITLES[group], [_example_values(example) for example in examples])
            for group, examples in groupby(report.examples, key=lambda example: example.group)
        ],
        scores=_score_table(report.scores),
        published=_published_table(report.scores),
        usage_tables=[(title, report.captions["word_usage"][name]) for name, title in USAGE_TITLES.items()],
        thumbnails={
            image_id: (_encode_jpeg(thumbnail.image), " ".join(thumbnail.words))
            for image_id, thumbnail in report.thumbnails.items()
        },
        splits=SPLITS,
        split_rows=split_rows(report.dataset),
        summary_rows=summary_rows(report.dataset),
        listed_leaks=listed_leaks(report.dataset),
        charts=svg_charts.layout_charts(report.history),
        layout=svg_charts,
        params={name: list(_flatten(values)) for name, values in report.params.items()},
        versions=_versions(),
    )
    write_atomically(path, page)


def _example_values(example: Example) -> dict[str, Any]:
    """Convert an example to the values that the template shows."""
    height, width = example.image.shape[:2]
    return {
        "image": _encode_jpeg(example.image),
        "width": width,
        "height": height,
        "grid": example.attention.shape[1:],
        "caption": join_words(example.words, example.language),
        "trained_caption": (
            None if example.trained_words is None else join_words(example.trained_words, example.language)
        ),
        "lang": html_lang(example.language),
        "separator": word_separator(example.language),
        "words": [
            _word(text, attention, sentinel, example.boxes.get(index, ()))
            for index, (text, attention, sentinel) in enumerate(
                zip(example.words, example.attention, sentinel_weights(example.attention).tolist(), strict=True)
            )
        ],
        "references": example.references,
        "scores": example.scores,
        "image_id": example.image_id,
    }


def _encode_jpeg(image: Pixels) -> str:
    """Encode an image as the data URL of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return jpeg_url(file.getvalue())


def _word(text: str, attention: npt.NDArray[np.floating], sentinel: float, boxes: Sequence[Box]) -> _Word:
    return _Word(
        text=text,
        map=encode_levels(attention_levels(attention)),
        peak=float(attention.max()),
        sentinel=sentinel,
        boxes=json.dumps([[round(edge, 4) for edge in box] for box in boxes]),
    )


def _score_table(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange scores as a table: a column per set of images, a row per metric, and each distinct protocol."""
    subsets = scores.get("subsets", {})
    columns = {"all": (scores, scores["intervals"])}
    columns |= {name: (values, scores["intervals"]["subsets"][name]) for name, values in subsets.items()}
    metrics_by_protocol: dict[tuple[str, ...], list[str]] = {}
    for name, lines in scores["protocol"].items():
        metrics_by_protocol.setdefault(tuple(lines), []).append(name)
    signature = scores["signature"]
    return {
        "columns": [(name, values["num_images"]) for name, (values, _) in columns.items()],
        "rows": [
            (name, [(values.get(name), intervals.get(name)) for values, intervals in columns.values()])
            for name in CORPUS_SCORES
            if name in scores
        ],
        "protocols": [
            (", ".join(names), [*lines, *(line for name in names for line in signature.get(name, []))])
            for lines, names in metrics_by_protocol.items()
        ],
        "unavailable": scores["unavailable"],
    }


def _published_table(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange published scores as a table: a column per metric, and a row per system with this run as the first."""
    published = scores["published"]
    metrics = [name for name in CORPUS_SCORES if any(name in row["scores"] for row in published)]
    return {
        "metrics": metrics,
        "run": [(scores.get(name), scores["intervals"].get(name)) for name in metrics],
        "rows": [(row, [row["scores"].get(name) for name in metrics]) for row in published],
        "signatures": [line for name in metrics for line in scores["signature"].get(name, [])],
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the params of a section by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", Path(value).name if key in PATH_KEYS else value
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"gridcap": __version__, "python": platform.python_version(), **packages}
