"""Search settings that captions were generated with: `search.json`.

Stage `generate` writes the file next to the captions, and `gridcap export` copies it into the exported model folder.
`gridcap predict` and the app start from it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.artifacts import Schema, read_document, write_document
from pipeline.generation.search import SearchParams

SCHEMA = Schema("gridcap.search", 2)
SEARCH_FILE = "search.json"
GENERATED_FOLDER = "generated"
"""Output folder of `generate`, next to the model folder."""

_REMEDY = "Run `dvc repro -f -s generate`, or export the model again."


@dataclass(frozen=True, kw_only=True)
class _RecordedSearch:
    """Content of `search.json` without its schema."""

    model_fingerprint: str
    search: SearchParams


def write_search_settings(folder: Path, search: SearchParams, model_fingerprint: str) -> None:
    """Write `search.json`.

    Args:
        folder: Folder for the file.
        search: Search settings that captions were generated with.
        model_fingerprint: Fingerprint of the training run of the model.
    """
    recorded = _RecordedSearch(model_fingerprint=model_fingerprint, search=search)
    write_document(folder / SEARCH_FILE, SCHEMA, asdict(recorded))


def search_settings_paths(model: Path) -> tuple[Path, Path]:
    """Return the paths that may hold the search settings of a model folder, in the order in which they are read."""
    return model / SEARCH_FILE, model.parent / GENERATED_FOLDER / SEARCH_FILE


def find_search_settings(model: Path, model_fingerprint: str) -> SearchParams | None:
    """Find the settings that a model's captions were generated with.

    `gridcap export` writes them to the model folder, `generate` to the folder `generated` next to it.

    Args:
        model: Model folder, searched first.
        model_fingerprint: Fingerprint of the model's training run; settings recorded with another model are ignored.

    Returns:
        The settings, or None if none are recorded for this model.

    Raises:
        UserError: The file is damaged or of another schema.
    """
    for path in search_settings_paths(model):
        if path.is_file():
            recorded = read_document(path, _RecordedSearch, _REMEDY, SCHEMA)
            if recorded.model_fingerprint == model_fingerprint:
                return recorded.search
    return None
