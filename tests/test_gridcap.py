"""The public Python API."""

import pytest

import gridcap
from tests.imports import imported_packages


def test_importing_gridcap_loads_no_heavy_package() -> None:
    program = "import gridcap\nassert 'Captioner' in gridcap.__all__"
    assert imported_packages(program, ["torch", "h5py", "spacy", "matplotlib"]) == []


def test_public_names_are_those_of_the_library() -> None:
    from pipeline import __version__
    from pipeline.evaluation.scoring import compare, score
    from pipeline.features.store import FeatureStore
    from pipeline.generation.caption import Caption
    from pipeline.generation.search import SearchParams
    from pipeline.prediction.captioner import Captioner

    expected = {
        "Caption": Caption,
        "Captioner": Captioner,
        "FeatureStore": FeatureStore,
        "SearchParams": SearchParams,
        "__version__": __version__,
        "compare": compare,
        "score": score,
    }
    assert {name: getattr(gridcap, name) for name in gridcap.__all__} == expected
    assert set(gridcap.__all__) <= set(dir(gridcap))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'gridcap' has no attribute 'nonsense'"):
        _ = gridcap.nonsense
