"""Sidebar controls for the search settings, generated from the fields of `SearchParams`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import streamlit as st
from pydantic import TypeAdapter

from pipeline.app.components import escape_markdown
from pipeline.errors import UserError
from pipeline.generation.search import SearchParams
from pipeline.params import check, to_plain

NUM_SAMPLED_CAPTIONS = 3
"""Minimum of the initial `n_best` when sampling."""

_MAIN_SETTINGS = ("method", "beam_size", "temperature", "top_p", "length_alpha", "max_length")
"""Settings that are always visible; the others are in an expander below."""
_SLIDER_MAX = {
    "beam_size": 10,
    "num_groups": 5,
    "diversity_penalty": 3.0,
    "guidance_scale": 2.0,
    "temperature": 2.0,
    "top_k": 50,
    "min_length": 20,
    "max_length": 40,
    "no_repeat_ngram_size": 5,
    "n_best": 10,
}
"""Maximum of a slider, for settings with a higher limit or none."""
_INTEGER_MAX = 2**53 - 1
"""Largest integer of a browser. A larger recorded seed is shown, and used, as this one."""
_SLIDER_STEP = 0.05
"""Step of the sliders of floats."""


def search_controls(defaults: SearchParams) -> SearchParams:
    """Show a control for every setting that has an effect.

    Beam search returns all captions of the beam, so `n_best` has a control only when sampling.

    Args:
        defaults: Initial values of the controls.

    Returns:
        The values of the controls. If they are inconsistent, a warning is shown and `defaults` are returned.
    """
    initial = {**to_plain(defaults), "n_best": max(NUM_SAMPLED_CAPTIONS, defaults.n_best)}
    values = to_plain(SearchParams.greedy(defaults.max_length))
    main, more = st.container(), st.expander("More")
    for name, field in TypeAdapter(SearchParams).json_schema()["properties"].items():
        if _has_effect(name, values):
            with main if name in _MAIN_SETTINGS else more:
                values[name] = _control(name, field, initial[name])
    if values["method"] == "beam":
        values["n_best"] = values["beam_size"]
    try:
        return check(values, "search", SearchParams, "settings")
    except UserError as error:
        st.warning(escape_markdown(str(error)))
        return replace(defaults, n_best=defaults.beam_size) if defaults.method == "beam" else defaults


def _has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect.

    Args:
        name: Name of the setting.
        values: Values of the settings that precede it in `SearchParams`; defaults for the others.
    """
    match name:
        case "beam_size" | "num_groups":
            return bool(values["method"] == "beam")
        case "temperature" | "top_k" | "top_p" | "seed" | "n_best":
            return bool(values["method"] == "sample")
        case "diversity_penalty":
            return bool(values["num_groups"] > 1)
        case "length_alpha":
            return bool(values["length_normalization"] != "none")
        case _:
            return True


def _control(name: str, field: Mapping[str, Any], value: Any) -> Any:
    """Show the control of one setting.

    Args:
        name: Name of the setting.
        field: JSON schema of the setting.
        value: Initial value of the control.

    Returns:
        The current value of the control.
    """
    label, description = name.replace("_", " ").capitalize(), field.get("description")
    limit = _SLIDER_MAX.get(name, field.get("maximum"))
    match field["type"]:
        case "string":
            return st.selectbox(label, field["enum"], field["enum"].index(value), help=description)
        case "boolean":
            return st.toggle(label, value, help=description)
        case "integer" if limit is None:
            return st.number_input(label, field["minimum"], _INTEGER_MAX, min(value, _INTEGER_MAX), help=description)
        case "integer":
            return st.slider(label, field["minimum"], max(limit, value), value, help=description)
        case "number" if limit is not None:
            low = float(field.get("minimum", _SLIDER_STEP))  # settings without `minimum` must be above 0
            return st.slider(label, low, max(float(limit), value), float(value), _SLIDER_STEP, help=description)
    raise AssertionError(f"no control for {name} of type {field['type']}")
