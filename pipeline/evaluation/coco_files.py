"""Captions in the files that coco-caption takes: results, and annotations to score them against."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.captions.records import read_records
from pipeline.errors import UserError
from pipeline.generation.caption_io import CAPTIONS_FILE

SHOWN = 5
"""Image ids that an error names at most."""


def read_results(path: Path) -> dict[int, str]:
    """Read captions by image id from COCO's results, or from a folder that `generate` made.

    Results are `[{"image_id": 1, "caption": "a dog"}, ...]`; what else an entry holds is passed over.

    Raises `UserError`, naming the file and the entry, where it is missing or malformed, or captions an image twice.
    """
    path = path / CAPTIONS_FILE if path.is_dir() else path
    entries = _read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f'{path}: must hold a list of results, [{{"image_id": 1, "caption": "a dog"}}, ...], {_got(entries)}'
        )
    captions: dict[int, str] = {}
    places: dict[int, int] = {}
    for place, entry in enumerate(entries):
        image_id, caption = _image_and_caption(entry, f"{path}, entry {place}")
        if image_id in captions:
            raise UserError(
                f"{path}, entry {place}: is a second caption of image {image_id}, after entry {places[image_id]}; "
                "keep one for each image"
            )
        captions[image_id], places[image_id] = caption, place
    if not captions:
        raise UserError(f"{path}: holds no captions; name a file with at least one")
    return captions


def read_references(path: Path) -> dict[int, list[str]]:
    """Read the captions of each image, by its id, from COCO's annotations or from a folder that `prepare` made.

    Annotations are `{"annotations": [{"image_id": 1, "caption": "a dog"}, ...], ...}`; what else the file holds is
    passed over, but for images without captions: they are in the result, with none.

    Raises `UserError`, naming the file and the annotation, where it is missing or malformed.
    """
    if path.is_dir():
        return {record.image_id: list(record.captions) for record in read_records(path)}
    document = _read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("annotations"), list):
        raise UserError(
            f'{path}: must hold COCO annotations, {{"annotations": [{{"image_id": 1, "caption": "a dog"}}, ...]}}, '
            f"{_got(document)}"
        )
    references: dict[int, list[str]] = {image_id: [] for image_id in _listed_images(document, path)}
    for place, entry in enumerate(document["annotations"]):
        image_id, caption = _image_and_caption(entry, f"{path}, annotation {place}")
        references.setdefault(image_id, []).append(caption)
    return references


def check_known(results: Mapping[int, str], references: Mapping[int, list[str]], path: Path, against: Path) -> None:
    """Raise `UserError` where an image of the results in `path` has no reference in `against`."""
    unknown = sorted(results.keys() - references.keys())
    if unknown:
        raise UserError(
            f"{path}: captions {len(unknown)} images that {against} lacks, such as {_named(unknown)}; "
            "name the annotations of the same images"
        )
    uncaptioned_images = sorted(image_id for image_id in results if not references[image_id])
    if uncaptioned_images:
        raise UserError(
            f"{against}: has no caption of {len(uncaptioned_images)} images that {path} captions, such as {_named(uncaptioned_images)}; "
            "leave them out of the results, or add captions"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a JSON file of captions") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a JSON file of captions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text at byte {error.start}; name a JSON file of captions") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: is no JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # lists too deep, and numbers too long, for Python's reader
        raise UserError(f"{path}: cannot be read as captions ({error}); name a JSON file of captions") from None


def _image_and_caption(entry: Any, place: str) -> tuple[int, str]:
    if not isinstance(entry, dict):
        raise UserError(f'{place}: must be a mapping with "image_id" and "caption", {_got(entry)}')
    for key in ("image_id", "caption"):
        if key not in entry:
            raise UserError(f'{place}: lacks "{key}"; it has {_named(sorted(entry)) or "nothing"}')
    image_id, caption = entry["image_id"], entry["caption"]
    if not isinstance(image_id, int) or isinstance(image_id, bool):
        raise UserError(f"{place}: image_id must be a whole number, {_got(image_id)}")
    if not isinstance(caption, str):
        raise UserError(f"{place}: caption must be text, {_got(caption)}")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"{place}: caption has half a character, {json.dumps(caption)}; write it out whole")
    return image_id, caption


def _listed_images(document: Mapping[str, Any], path: Path) -> list[int]:
    images = document.get("images", [])
    if not isinstance(images, list):
        raise UserError(f'{path}: "images" must be a list, {_got(images)}')
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("id"), int):
            raise UserError(f'{path}, image {place}: must be a mapping with a whole number as "id", {_got(image)}')
    return [image["id"] for image in images]


def _got(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"got {text if len(text) <= 60 else text[:60] + ' ...'}"


def _named(values: list[Any]) -> str:
    return ", ".join(map(str, values[:SHOWN]))
