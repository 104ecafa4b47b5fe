"""Parser of Karpathy's split files for Flickr8k, Flickr30k and COCO: `dataset_*.json`.

From A. Karpathy and L. Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR 2015.
"""

from pathlib import Path
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from pipeline.artifacts import read_json
from pipeline.captions.records import Split
from pipeline.captions.sources.parsed_file import (
    REMEDY,
    ImageId,
    ParsedFile,
    ParsedImage,
    SourceCaption,
    id_from_name,
    join_relative,
)


class _Sentence(TypedDict):
    raw: NotRequired[str | None]


class _Image(TypedDict):
    filename: str
    filepath: NotRequired[str]
    split: Literal["train", "restval", "val", "test"]
    cocoid: NotRequired[ImageId]
    sentences: list[_Sentence]


class _KarpathyFile(TypedDict):
    images: list[_Image]


def parse(path: Path, folder: str) -> ParsedFile:
    """Parse a `dataset_*.json` file.

    The split `restval` (COCO validation images that are used for training) becomes `train`. Image ids are those of COCO
    if the file has them; otherwise they are derived from the image paths.

    Args:
        path: The file.
        folder: Folder of its images, relative to the image folder.

    Raises:
        UserError: The file is missing or malformed.
    """
    images = read_json(path, _KarpathyFile, REMEDY)["images"]
    return ParsedFile(
        images=[_parse_image(f"{path}: images[{index}]", folder, image) for index, image in enumerate(images)],
        unmatched_captions=[],
    )


def _parse_image(location: str, folder: str, image: _Image) -> ParsedImage:
    file = join_relative(folder, image.get("filepath", "."), image["filename"])
    split: Split = "train" if image["split"] == "restval" else image["split"]
    return ParsedImage(
        image_id=image["cocoid"] if "cocoid" in image else id_from_name(file),
        has_name_id="cocoid" not in image,
        file=file,
        location=location,
        split=split,
        captions=tuple(
            SourceCaption(sentence.get("raw") or "", f"{location}.sentences[{index}]")
            for index, sentence in enumerate(image["sentences"])
        ),
    )
