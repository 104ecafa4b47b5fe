"""Small corpora of captions for the tests of metrics, and pycocoevalcap's form of them."""

import csv
import json
import re
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import strategies as st

REAL_TEXT = Path(__file__).parents[2] / "shared/real/text"

Hypotheses = list[list[str]]
References = list[list[list[str]]]

_captions = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9)
images = st.tuples(st.just([]) | _captions, st.lists(_captions, min_size=1, max_size=4))
"""Random images: a hypothesis, which may be empty, and its references."""
random_corpora = st.lists(images, min_size=1, max_size=5).map(
    lambda pairs: ([hypothesis for hypothesis, _ in pairs], [references for _, references in pairs])
)
"""Random corpora: hypotheses and references."""


def make_corpus(*images: tuple[str, ...]) -> tuple[Hypotheses, References]:
    """Hypotheses and references from one tuple per image: the hypothesis, then its references."""
    hypotheses = [image[0].split() for image in images]
    references = [[caption.split() for caption in image[1:]] for image in images]
    return hypotheses, references


def to_pycocoevalcap(
    hypotheses: Hypotheses, references: References
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and results as pycocoevalcap's scorers take them."""
    gts = {index: [" ".join(words) for words in captions] for index, captions in enumerate(references)}
    return gts, {index: [" ".join(words)] for index, words in enumerate(hypotheses)}


def flickr8k_corpus(num_images: int) -> tuple[Hypotheses, References]:
    """The first human caption of each photograph against the other four; skips without the file."""
    path = REAL_TEXT / "flickr8k_captions.csv"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["image"])][:num_images]
    words = [[re.findall("[a-z0-9]+", row["caption"].lower()) for row in group] for group in groups]
    return [captions[0] for captions in words], [captions[1:] for captions in words]


def coco_captions(num_images: int) -> list[str]:
    """All captions of some photographs of COCO, untokenized; skips without the file."""
    path = REAL_TEXT / "captions_val2017_part.json"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    captions: dict[int, list[str]] = {}
    for annotation in json.loads(path.read_text())["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [caption for of_image in list(captions.values())[:num_images] for caption in of_image]
