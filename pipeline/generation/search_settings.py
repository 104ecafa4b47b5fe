"""Search settings that `generate` used, recorded for prediction: `search.json`.

`generate` writes the file beside the captions, `gridcap export` copies it into the model folder, and `gridcap predict`
and the app start from it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.artifacts import Schema, read_json, write_json
from pipeline.generation.search import SearchParams

SCHEMA = Schema("gridcap.search", 1)
SEARCH_FILE = "search.json"
GENERATED_FOLDER = "generated"
"""Sibling folder of the model folder in which `generate` writes, unless dvc.yaml was changed."""


@dataclass(frozen=True, kw_only=True)
class _Document:
    model_fingerprint: str
    search: SearchParams


def write_search_settings(folder: Path, search: SearchParams, model_fingerprint: str) -> None:
    """Write `search.json` into `folder`: the settings and the training run of the model that they were used with."""
    document = {"schema": SCHEMA.name, "schema_version": SCHEMA.version, "model_fingerprint": model_fingerprint}
    write_json(folder / SEARCH_FILE, {**document, "search": asdict(search)})


def find_search_settings(model: Path, model_fingerprint: str) -> SearchParams | None:
    """Find the settings that a model's captions were generated with.

    Looks in the model folder, where `gridcap export` puts them, then in `../generated`, where `generate` does.

    Args:
        model: The model folder.
        model_fingerprint: Fingerprint of the model's training run; settings used with another model are ignored.

    Returns:
        The settings, or None where no captions of this model were generated.

    Raises:
        UserError: The file is damaged or of another schema.
    """
    for folder in (model, model.parent / GENERATED_FOLDER):
        path = folder / SEARCH_FILE
        if path.is_file():
            found = read_json(path, _Document, "Run `dvc repro -f -s generate`, or export the model again.", SCHEMA)
            if found.model_fingerprint == model_fingerprint:
                return found.search
    return None
