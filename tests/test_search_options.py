"""The options of `gridcap predict` for search settings agree with `SearchParams` and its defaults."""

import re
import types
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
import pytest

from pipeline import cli
from pipeline.errors import UserError
from pipeline.generation.search import SearchParams
from pipeline.prediction.captioner import DEFAULT_SEARCH
from pipeline.prediction.search_options import override

FIELDS = [field.name for field in fields(SearchParams)]
FIELD_TYPES = get_type_hints(SearchParams, include_extras=True)
OPTIONS = {
    name: hint
    for name, hint in get_type_hints(cli.predict, include_extras=True).items()
    if getattr((get_args(hint) or (None,))[-1], "rich_help_panel", None) == "Search settings"
}


def unwrap(annotated: Any) -> tuple[Any, Any]:
    """Split an annotation into its type, without None, and the annotation itself."""
    if get_origin(annotated) is not Annotated:
        return annotated, None
    value_type, metadata = get_args(annotated)[:2]
    if isinstance(value_type, types.UnionType) or type(None) in get_args(value_type):
        [value_type] = [member for member in get_args(value_type) if member is not type(None)]
    return value_type, metadata


def test_there_is_one_option_for_each_field_in_the_same_order() -> None:
    assert list(OPTIONS) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_has_the_type_choices_bounds_and_default_of_its_field(name: str) -> None:
    field_type, constraint = unwrap(FIELD_TYPES[name])
    option_type, option = unwrap(OPTIONS[name])
    assert option_type == field_type
    assert get_origin(field_type) is Literal or field_type in (int, float, bool)
    bounds: dict[str, float | None] = {"min": None, "max": None}
    for bound in getattr(constraint, "metadata", ()):
        match bound:
            case annotated_types.Ge(ge):
                bounds["min"] = ge
            case annotated_types.Gt(gt):  # typer has no exclusive bounds; `override` refuses the bound itself
                bounds["min"] = gt
            case annotated_types.Le(le):
                bounds["max"] = le
    assert {"min": option.min, "max": option.max} == bounds
    default = getattr(DEFAULT_SEARCH, name)
    expected = "no" if default is False else str(default)
    assert option.show_default == f"recorded, else {expected}"
    assert re.match(r"[A-Z].*\.$", option.help)


def test_options_replace_single_settings() -> None:
    unset: dict[str, Any] = dict.fromkeys(asdict(DEFAULT_SEARCH))
    assert override(DEFAULT_SEARCH, **unset) == DEFAULT_SEARCH
    changed = override(DEFAULT_SEARCH, **(unset | {"beam_size": 7, "allow_unk": True, "length_alpha": 0.0}))
    assert changed == replace(DEFAULT_SEARCH, beam_size=7, allow_unk=True, length_alpha=0.0)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"n_best": 6}, ["n_best must be at most beam_size (5), got 6"]),
        ({"top_p": 0.0}, ["top_p", "greater than 0"]),
        ({"method": "sample"}, ["beam_size must be 1", "method sample"]),
    ],
)
def test_contradictory_options_are_errors(options: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        override(DEFAULT_SEARCH, **options)
    for fact in ["command line", *facts]:
        assert fact in str(error.value)
