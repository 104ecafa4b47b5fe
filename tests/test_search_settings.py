"""Search settings recorded with captions."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.generation.search import SearchParams
from pipeline.generation.search_settings import SCHEMA, find_search_settings, write_search_settings

SEARCH = replace(SearchParams.greedy(12), beam_size=4, n_best=2)


@pytest.mark.parametrize("folder", ["model", "generated"])
def test_settings_are_found_in_the_model_folder_and_next_to_it(tmp_path: Path, folder: str) -> None:
    (tmp_path / "model").mkdir()
    write_search_settings(tmp_path / folder, SEARCH, "run 1")
    assert find_search_settings(tmp_path / "model", "run 1") == SEARCH


def test_settings_in_the_model_folder_take_precedence(tmp_path: Path) -> None:
    write_search_settings(tmp_path / "model", SEARCH, "run 1")
    write_search_settings(tmp_path / "generated", SearchParams.greedy(5), "run 1")
    assert find_search_settings(tmp_path / "model", "run 1") == SEARCH


def test_settings_of_another_model_are_ignored(tmp_path: Path) -> None:
    write_search_settings(tmp_path / "generated", SEARCH, "run 1")
    assert find_search_settings(tmp_path / "model", "run 2") is None


def test_no_recorded_settings_are_none(tmp_path: Path) -> None:
    assert find_search_settings(tmp_path / "model", "run 1") is None


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        (f'"schema_version": {SCHEMA.version}', '"schema_version": 9', ["gridcap.search", "version 9"]),
        ('"beam_size": 4', '"beam_size": 0', ["search.beam_size", "greater than or equal to 1"]),
        ('"n_best": 2', '"n_best": 5', ["search", "n_best must be at most beam_size"]),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, old: str, new: str, facts: list[str]) -> None:
    write_search_settings(tmp_path / "model", SEARCH, "run 1")
    path = tmp_path / "model" / "search.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as error:
        find_search_settings(tmp_path / "model", "run 1")
    for fact in [str(path), *facts, "dvc repro -f -s generate"]:
        assert fact in str(error.value)
