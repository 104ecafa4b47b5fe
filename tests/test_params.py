from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.errors import UserError
from pipeline.params import MAX_DEPTH, check, load, load_key, params_section, read_yaml, require_unchanged
from pipeline.presets import section_class
from tests.paths import ROOT


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


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("outer: {rate: 2024-05-01}", ["outer.rate", "date", "2024-05-01"]),
        ("outer: {sizes: [1, 2001-12-14t21:59:43.10-05:00]}", ["outer.sizes.1", "datetime"]),
        ("outer: {rate: 2024-13-45}", ["outer.rate", "month"]),
        ("outer: {rate: !!binary aGVsbG8=}", ["outer.rate", "bytes"]),
        ("outer: {rate: !!set {a}}", ["outer.rate", "set"]),
        ("outer: {rate: 99999999999999999999}", ["outer.rate", "2^63", "67 bits"]),
        (f"outer: {{rate: 0x{'f' * 9999}}}", ["outer.rate", "2^63"]),
        (f"outer: {{rate: {'9' * 5000}}}", ["outer.rate", "5000 digits"]),
        ("outer: {rate: !!float high}", ["outer.rate", "high"]),
        ("outer: {rate: !!bool maybe}", ["outer.rate", "maybe"]),
        ('outer: {rate: !!int ""}', ["outer.rate"]),
        ('outer: {rate: "\\UFFFFFFFF"}', ["a value is not valid"]),
        ("outer: &outer {rate: *outer}", ["outer.rate", "itself"]),
        ("outer: &outer {<<: *outer}", ["outer.rate is missing"]),
        (f"outer: {{sizes: {'[' * MAX_DEPTH}{']' * MAX_DEPTH}}}", ["outer.sizes.0", f"deeper than {MAX_DEPTH}"]),
        (f"outer: {'[' * 600}{']' * 600}", ["outer is nested", f"deeper than {MAX_DEPTH}"]),
        ("outer: {1: 2}", ["outer", "strings as keys", "got 1"]),
        ("outer: {2024-05-01: 2}", ["outer", "strings as keys", "2024-05-01"]),
        ('outer: {rate: "a\\0b"}', ["outer.rate", "NUL"]),
        ('outer: {rate: "\\ud800"}', ["outer.rate", "surrogates"]),
        (
            "a: &a [1, 2, 3, 4, 5, 6]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefg")),
            ["f.", "aliases"],
        ),
    ],
)
def test_a_value_that_is_not_plain_is_refused_by_key(tmp_path: Path, text: str, facts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load(path, "outer", Outer)
    assert [fact for fact in [str(path), *facts] if fact not in str(caught.value)] == []
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("tokenize", "max_length", 10**6),
        ("encode", "image_size", 160_000),
        ("train", "batch_size", 10**9),
        ("train", "max_epochs", 10**9),
        ("train", "decoder.hidden_size", 10**6),
        ("train", "max_length", 10**6),
        ("refine", "num_samples", 10**6),
        ("generate", "search.beam_size", 10**6),
        ("generate", "search.num_groups", 10**6),
        ("generate", "search.n_best", 10**6),
        ("generate", "search.max_length", 10**9),
        ("evaluate", "bootstrap_samples", 10**9),
        ("evaluate", "attention_plots", 10**9),
        ("evaluate", "report.random", 10**9),
    ],
)
def test_an_extreme_value_is_refused_with_its_bound(section: str, key: str, value: float) -> None:
    values = read_yaml(ROOT / "params.yaml")[section]
    *parents, name = key.split(".")
    target = values
    for parent in parents:
        target = target[parent]
    target[name] = value
    with pytest.raises(UserError, match=rf"{section}\.{key} must be less than or equal to \d+"):
        check(values, section, section_class(section), "params.yaml")
