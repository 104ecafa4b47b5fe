"""Documents that a test has edited."""

import json
from pathlib import Path
from typing import Any

from pipeline.artifacts import document_digest


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Change keys of a document, and record its new digest."""
    document = json.loads(path.read_text()) | changes
    del document["document_digest"]
    path.write_text(json.dumps(document | {"document_digest": document_digest(document)}))
