"""The search controls, run by the test driver of Streamlit."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from streamlit.testing.v1 import AppTest

from pipeline.generation.search import SearchParams

pytestmark = pytest.mark.slow

BEAM = replace(
    SearchParams.greedy(30), beam_size=5, length_normalization="average", length_alpha=0.5, no_repeat_ngram_size=4
)
SAMPLING = replace(SearchParams.greedy(20), method="sample", temperature=0.7, top_p=0.9, n_best=4, seed=3)


def show_controls(defaults: dict[str, object]) -> None:
    # The test driver runs this function as a separate script.
    import json
    from dataclasses import asdict

    import streamlit as st

    from pipeline.app.search_controls import search_controls
    from pipeline.generation.search import SearchParams

    st.text(json.dumps(asdict(search_controls(SearchParams(**defaults)))))


@pytest.fixture(autouse=True)
def _main_module() -> Iterator[None]:
    """Undo what AppTest does to `__main__`: processes that other tests spawn would import its script."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def run_controls(defaults: SearchParams) -> AppTest:
    app = AppTest.from_function(show_controls, args=(asdict(defaults),)).run(timeout=60)
    assert not app.exception
    return app


def settings(app: AppTest) -> SearchParams:
    return SearchParams(**json.loads(app.text[0].value))


def labels(app: AppTest) -> set[str]:
    return {control.label for kind in (app.slider, app.selectbox, app.toggle, app.number_input) for control in kind}


def find(controls: Any, label: str) -> Any:
    (control,) = [control for control in controls if control.label == label]
    return control


def test_beam_search_starts_from_the_defaults_and_returns_the_whole_beam() -> None:
    assert settings(run_controls(BEAM)) == replace(BEAM, n_best=5)


def test_sampling_starts_from_the_defaults() -> None:
    assert settings(run_controls(SAMPLING)) == SAMPLING


def test_only_settings_that_have_an_effect_are_shown() -> None:
    app = run_controls(BEAM)
    assert {"Beam size", "Num groups", "Length alpha"} <= labels(app)
    assert labels(app).isdisjoint({"Temperature", "Top k", "Top p", "Seed", "N best", "Diversity penalty"})
    find(app.selectbox, "Length normalization").set_value("none").run()
    assert "Length alpha" not in labels(app)
    find(app.selectbox, "Method").set_value("sample").run()
    assert {"Temperature", "Top k", "Top p", "Seed", "N best"} <= labels(app)
    assert labels(app).isdisjoint({"Beam size", "Num groups"})
    assert not app.exception


def test_switch_to_sampling_gives_three_captions() -> None:
    app = run_controls(BEAM)
    find(app.selectbox, "Method").set_value("sample").run()
    assert (settings(app).method, settings(app).beam_size, settings(app).n_best) == ("sample", 1, 3)


def test_controls_change_the_settings() -> None:
    app = run_controls(BEAM)
    find(app.slider, "Beam size").set_value(6).run()
    find(app.slider, "Num groups").set_value(2).run()
    find(app.slider, "Diversity penalty").set_value(0.5).run()
    assert settings(app) == replace(BEAM, beam_size=6, num_groups=2, diversity_penalty=0.5, n_best=6)


def test_inconsistent_settings_are_reported_and_the_defaults_used() -> None:
    app = run_controls(BEAM)
    find(app.slider, "Num groups").set_value(2).run()
    (warning,) = app.warning
    assert "5" in warning.value
    assert settings(app) == replace(BEAM, n_best=5)


def test_defaults_beyond_the_usual_range_of_a_slider_are_kept() -> None:
    wide = replace(BEAM, beam_size=32, max_length=80, n_best=2)
    assert settings(run_controls(wide)) == replace(wide, n_best=32)
    hot = replace(SAMPLING, temperature=5.0, n_best=50)
    assert settings(run_controls(hot)) == hot


def test_seed_beyond_the_integers_of_a_browser_is_reduced() -> None:
    assert settings(run_controls(replace(SAMPLING, seed=2**60))).seed == 2**53 - 1
