from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.errors import UserError
from pipeline.params import load, params_section


@params_section
class Inner:
    kind: Literal["a", "b"]
    """Which kind."""


@params_section
class Outer:
    rate: Annotated[float, Field(gt=0)]
    """Steps a second."""
    sizes: tuple[int, ...]
    """Widths, in pixels."""
    inner: Inner | None


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_a_section_is_read_with_yaml_1_2_numbers_and_nested_sections(tmp_path: Path) -> None:
    path = written(tmp_path, "outer: {rate: 1e-4, sizes: [1, 2], inner: {kind: b}}")
    assert load(path, "outer", Outer) == Outer(rate=1e-4, sizes=(1, 2), inner=Inner(kind="b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outer: {rate: -1, sizes: [], inner: null}", "outer.rate must be greater than 0, got -1"),
        ("outer: {rate: fast, sizes: [], inner: null}", 'outer.rate must be a valid number, got "fast"'),
        ("outer: {sizes: [], inner: null}", "outer.rate is missing"),
        ("outer: {rate: 1, sizes: [], inner: null, rates: 2}", "outer.rates is not a known key"),
        ("outer: {rate: 1, sizes: [x], inner: null}", 'outer.sizes.0 must be a valid integer, got "x"'),
        ("outer: {rate: 1, sizes: [1], inner: {kind: c}}", "outer.inner.kind must be 'a' or 'b', got \"c\""),
        ("other: {}", "has no section 'outer'"),
        ("outer: [", "is no valid YAML"),
        ("- outer", "must hold a mapping of sections"),
    ],
)
def test_a_fault_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path, "outer", Outer)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        load(tmp_path / "absent.yaml", "outer", Outer)
