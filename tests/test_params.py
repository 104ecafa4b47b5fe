from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.errors import UserError
from pipeline.params import load, load_key, params_section, require_unchanged


@params_section
class Inner:
    kind: Literal["a", "b"]
    """Kind."""


@params_section
class Outer:
    rate: Annotated[float, Field(gt=0)]
    """Steps per second."""
    sizes: tuple[int, ...]
    """Widths in px."""
    inner: Inner | None


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_yaml_1_2_numbers_and_nested_sections_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "outer: {rate: 1e-4, sizes: [1, 2], inner: {kind: b}}")
    assert load(path, "outer", Outer) == Outer(rate=1e-4, sizes=(1, 2), inner=Inner(kind="b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outer: {rate: -1, sizes: [], inner: null}", "outer.rate must be greater than 0, got -1"),
        ("outer: {rate: fast, sizes: [], inner: null}", 'outer.rate must be a valid number, got "fast"'),
        ("outer: {sizes: [], inner: null}", "outer.rate is missing"),
        ("outer: {rate: 1, sizes: [], inner: null, rates: 2}", "outer.rates is not a valid key"),
        ("outer: {rate: 1, sizes: [x], inner: null}", 'outer.sizes.0 must be a valid integer, got "x"'),
        ("outer: {rate: 1, sizes: [1], inner: {kind: c}}", "outer.inner.kind must be 'a' or 'b', got \"c\""),
        ("other: {}", "section outer is missing"),
        ("outer: [", "not valid YAML"),
        ("- outer", "must be a mapping of sections"),
    ],
)
def test_an_error_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path, "outer", Outer)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        load(tmp_path / "absent.yaml", "outer", Outer)


def test_a_single_key_is_read_without_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: {root: data/x, unknown: 1}")
    assert load_key(path, "dataset.root", Path) == Path("data/x")
    with pytest.raises(UserError, match=r"params\.yaml: dataset\.images is missing"):
        load_key(path, "dataset.images", str)
    with pytest.raises(UserError, match=r"dataset\.unknown must be a valid string, got 1"):
        load_key(path, "dataset.unknown", str)


def test_a_section_that_changed_during_the_stage_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "outer: {rate: 1, sizes: [], inner: null}")
    values = load(path, "outer", Outer)
    require_unchanged(path, "outer", values)
    write(tmp_path, "outer: {rate: 2, sizes: [], inner: null}")
    with pytest.raises(UserError, match=r"section outer was changed"):
        require_unchanged(path, "outer", values)
