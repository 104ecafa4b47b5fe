"""Corpora of captions for the tests of metrics, and their conversion for pycocoevalcap."""

import csv
import json
import re
from collections.abc import Mapping
from itertools import groupby

import pytest
from hypothesis import strategies as st

from pipeline.metrics.corpus import Corpus
from pipeline.metrics.tokenizers import SPACY
from tests.paths import REAL

REAL_TEXT = REAL / "text"

Hypotheses = list[list[str]]
References = list[list[list[str]]]

REFERENCES = {
    2: ["two children play in water", "kids play in a pool", "two kids in the water"],
    4: ["a dog runs on grass", "a brown dog runs over the grass", "a dog in a field"],
    7: ["a plate of food"],
    9: ["a man rides a red bike", "a man on a bike"],
}
"""Words of references by image id; one to three for each of four images."""
CAPTIONS = {2: "two kids play in the water", 4: "a dog on the grass", 7: "a plate", 9: "a man rides a bike"}
"""Words of generated captions of the same images."""

_captions = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9)
images = st.tuples(st.just([]) | _captions, st.lists(_captions, min_size=1, max_size=4))
"""Random images: a hypothesis, possibly empty, with its references."""
random_corpora = st.lists(images, min_size=1, max_size=5).map(
    lambda pairs: ([hypothesis for hypothesis, _ in pairs], [references for _, references in pairs])
)
"""Random corpora: hypotheses and references."""


def small_corpus(references: Mapping[int, list[str]] = REFERENCES) -> Corpus:
    """Build the corpus of `CAPTIONS` with references by image id."""
    return Corpus(
        image_ids=tuple(CAPTIONS),
        hypotheses=tuple(caption.split() for caption in CAPTIONS.values()),
        references=tuple([caption.split() for caption in references[image_id]] for image_id in CAPTIONS),
        tokenization=SPACY,
    )


def make_corpus(*images: tuple[str, ...]) -> tuple[Hypotheses, References]:
    """Split hypotheses and references, from one tuple per image: the hypothesis, then its references."""
    hypotheses = [image[0].split() for image in images]
    references = [[caption.split() for caption in image[1:]] for image in images]
    return hypotheses, references


def to_pycocoevalcap(
    hypotheses: Hypotheses, references: References
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Convert hypotheses and references to the arguments `gts` and `res` of pycocoevalcap's scorers."""
    gts = {index: [" ".join(words) for words in captions] for index, captions in enumerate(references)}
    return gts, {index: [" ".join(words)] for index, words in enumerate(hypotheses)}


def flickr8k_corpus(num_images: int) -> tuple[Hypotheses, References]:
    """Read images of Flickr8k: the first caption as hypothesis, the other four as references.

    Skips the test if the file is missing.
    """
    path = REAL_TEXT / "flickr8k_captions.csv"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["image"])][:num_images]
    words = [[re.findall("[a-z0-9]+", row["caption"].lower()) for row in group] for group in groups]
    return [captions[0] for captions in words], [captions[1:] for captions in words]


def coco_captions(num_images: int) -> list[str]:
    """Read all captions of some images of COCO, untokenized. Skips the test if the file is missing."""
    path = REAL_TEXT / "captions_val2017_part.json"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    captions: dict[int, list[str]] = {}
    for annotation in json.loads(path.read_text())["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [caption for image_captions in list(captions.values())[:num_images] for caption in image_captions]
