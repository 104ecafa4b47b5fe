"""Karpathy's division of Flickr8k, Flickr30k and COCO: `dataset_*.json`.

From A. Karpathy and L. Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR
2015.
"""

from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from pipeline.captions.records import Split
from pipeline.captions.sources.parsed_file import (
    Caption,
    Entry,
    ImageId,
    Source,
    id_from_name,
    join_relative,
    read_json,
)


class _Sentence(TypedDict):
    raw: str


class _Image(TypedDict):
    filename: str
    filepath: NotRequired[str]
    split: Literal["train", "restval", "val", "test"]
    cocoid: NotRequired[ImageId]
    sentences: list[_Sentence]


class _Dataset(TypedDict):
    images: list[_Image]


def read(path: Path, folder: str) -> Source:
    """Read one `dataset_*.json` whose images lie in `folder` below the image folder.

    `restval`, the part of COCO's validation images that is trained on, becomes `train`. Image ids are COCO's
    where the file gives them, else they come from file names. Raises `UserError`, naming the place,
    where the file has another form.
    """
    images = read_json(path, _Dataset, "Karpathy dataset file")["images"]
    return Source(
        entries=[_entry(path, folder, number, image) for number, image in enumerate(images)], unmatched_captions=[]
    )


def _entry(path: Path, folder: str, number: int, image: _Image) -> Entry:
    file = join_relative(folder, image.get("filepath", "."), image["filename"])
    place = f"{path}, images[{number}]"
    split: Split = "train" if image["split"] == "restval" else image["split"]
    return Entry(
        image_id=image["cocoid"] if "cocoid" in image else id_from_name(file),
        file=file,
        place=place,
        split=split,
        captions=tuple(
            Caption(sentence["raw"], f"{place}.sentences[{index}]") for index, sentence in enumerate(image["sentences"])
        ),
    )
