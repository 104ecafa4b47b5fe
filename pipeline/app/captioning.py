"""The page that captions a picture: by one model, or by two side by side."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st

from pipeline.app import models
from pipeline.app.components import literal, pick, show_caption
from pipeline.app.samples import samples, thumbnails
from pipeline.app.search_controls import search_settings
from pipeline.app.uploads import FORMATS, Picture, check, preview
from pipeline.errors import UserError
from pipeline.generation.search import SearchParams
from pipeline.prediction.captioner import DEFAULT_SEARCH

Call = tuple[Any, ...]
"""A function with what it is called with, all of it hashable."""


def prepare(folders: Sequence[Path]) -> None:
    """Load models and samples, which all sessions share. Raises `UserError` where a model does not load."""
    thumbnails()
    for folder in folders:
        models.captioner(folder)


def page() -> None:
    """Draw the page for the model folders that the command line names; raises nothing that a user can cause."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    with st.sidebar:
        chosen = _choose(folders)
        st.subheader("Search", anchor=False)
        settings = search_settings(replace(DEFAULT_SEARCH, n_best=3))
    endings = [ending for kind in FORMATS.values() for ending in kind]
    # Under a new name each time, it stands empty again: the file that it had need not be taken away before the next.
    key = f"upload {st.session_state.get('taken', 0)}"
    st.file_uploader("Picture", endings, key=key, on_change=_take_upload, args=(key,), label_visibility="collapsed")
    pick(thumbnails(), _take_sample, _take)
    picture = st.session_state.setdefault("picture", samples()[0])
    try:
        check(picture)
        _caption(picture, chosen, settings)
    except UserError as error:
        st.error(literal(str(error)))


def _choose(folders: list[Path]) -> list[Path]:
    first = st.selectbox("Model", folders, format_func=str)
    others = [folder for folder in folders if folder != first]
    second = st.selectbox("Beside it", others, index=None, format_func=str) if others else None
    return [first, second] if second else [first]


def _caption(picture: Picture, chosen: list[Path], settings: SearchParams) -> None:
    columns = st.columns(len(chosen))
    places = [column.container() for column in columns]  # above what tells that one has to wait
    asked: dict[Call, Future[Any]] = {}
    try:
        with columns[0], st.spinner("Looking …"):
            shown = _ask(asked, preview, picture)
            captions = [
                _ask(asked, models.captioner(folder).caption, (picture.content,), settings) for folder in chosen
            ]
    finally:
        for call, answer in st.session_state.get("answers", {}).items():
            if call not in asked:
                answer.cancel()
        st.session_state["answers"] = asked
    for folder, column, place, caption in zip(chosen, columns, places, captions, strict=True):
        with column, st.spinner("Looking …"):
            seen, [found] = shown.result(), caption.result()
        with place:
            if len(chosen) > 1:
                st.caption(literal(str(folder)))
            show_caption(seen, found, key=f"viewer {folder}")


def _ask(asked: dict[Call, Future[Any]], work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Have `work` done in its turn, unless the answer stands from the last time that this session's page was drawn."""
    call = (work, *arguments)
    asked[call] = st.session_state.get("answers", {}).get(call) or models.queue().ask(partial(work, *arguments))
    return asked[call]


def _take_upload(key: str) -> None:
    upload = st.session_state[key]
    _take(upload.name, upload.getvalue())
    st.session_state["taken"] = st.session_state.get("taken", 0) + 1


def _take_sample(number: int) -> None:
    st.session_state["picture"] = samples()[number]


def _take(name: str, content: bytes) -> None:
    st.session_state["picture"] = Picture(name=name, content=content)
