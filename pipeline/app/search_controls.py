"""Controls for the settings of the search, made from the fields of their section."""

from collections.abc import Mapping
from typing import Any

import streamlit as st
from pydantic import TypeAdapter

from pipeline.app.components import literal
from pipeline.errors import UserError
from pipeline.generation.search import SearchParams
from pipeline.params import check, to_plain

_IN_VIEW = ("method", "beam", "temperature", "top_p", "length_alpha", "max_length")
"""Settings that are seen at once; the others wait below."""
_HIGHEST = {
    "beam_size": 10,
    "num_groups": 5,
    "diversity_penalty": 3.0,
    "temperature": 2.0,
    "top_k": 50,
    "min_length": 20,
    "max_length": 40,
    "no_repeat_ngram_size": 5,
    "n_best": 10,
}
"""Where the slider of a setting without an upper limit ends; without one here either, a setting is typed."""


def search_settings(usual: SearchParams) -> SearchParams:
    """Show a control for each setting that has a meaning, at first as `usual`, and give the settings that result.

    Settings that do not go together are told, and `usual` given.
    """
    values = to_plain(SearchParams.greedy(usual.max_length))
    in_view, join_relative = st.container(), st.expander("More")
    for name, field in TypeAdapter(SearchParams).json_schema()["properties"].items():
        if _means_something(name, values):
            with in_view if name in _IN_VIEW else join_relative:
                values[name] = _control(name, field, to_plain(usual)[name])
    if values["method"] == "beam_size":
        values["n_best"] = values["beam"]
    try:
        return check(values, "search", SearchParams, "settings")
    except UserError as error:
        st.warning(literal(str(error)))
        return usual


def _means_something(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a setting changes anything, given those before it."""
    match name:
        case "beam" | "num_groups":
            return bool(values["method"] == "beam")
        case "temperature" | "top_k" | "top_p" | "seed" | "n_best":
            return bool(values["method"] == "sample")
        case "diversity":
            return bool(values["groups"] > 1)
        case "length_alpha":
            return bool(values["length_normalization"] != "none")
        case _:
            return True


def _control(name: str, field: Mapping[str, Any], value: Any) -> Any:
    label, about = name.replace("_", " ").capitalize(), field.get("description")
    highest = field.get("maximum", _HIGHEST.get(name))
    match field["type"]:
        case "string":
            return st.selectbox(label, field["enum"], field["enum"].index(value), help=about)
        case "boolean":
            return st.toggle(label, value, help=about)
        case "integer" if highest is None:
            return st.number_input(label, field["minimum"], None, value, help=about)
        case "integer":
            return st.slider(label, field["minimum"], highest, value, help=about)
        case "number":
            lowest = field.get("minimum", 0.05)  # what has none must be more than 0
            return st.slider(label, float(lowest), float(highest), float(value), 0.05, help=about)
    raise AssertionError(f"no control shows {name}, a {field['type']}")
