"""The public Python API of gridcap.

    from gridcap import Captioner

    captioner = Captioner.load("data/model")
    for caption in captioner.caption(["photo.jpg"]):
        print(caption.text, caption.confidence)

Names are imported on first use, so importing this module loads neither torch nor h5py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline import __version__

if TYPE_CHECKING:
    from pipeline.evaluation.scoring import compare, score
    from pipeline.features.store import FeatureStore
    from pipeline.generation.caption import Caption
    from pipeline.generation.search import SearchParams
    from pipeline.prediction.captioner import Captioner

__all__ = ["Caption", "Captioner", "FeatureStore", "SearchParams", "__version__", "compare", "score"]

_MODULES = {
    "Caption": "pipeline.generation.caption",
    "Captioner": "pipeline.prediction.captioner",
    "FeatureStore": "pipeline.features.store",
    "SearchParams": "pipeline.generation.search",
    "compare": "pipeline.evaluation.scoring",
    "score": "pipeline.evaluation.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gridcap' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
