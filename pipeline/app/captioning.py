"""The captioning page: one model captions an image, or two models for comparison."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from pipeline.app.components import escape_markdown, pick_image, show_caption
from pipeline.app.models import load_captioner
from pipeline.app.samples import sample_images, thumbnails
from pipeline.app.search_controls import search_controls
from pipeline.app.upload_store import upload_store
from pipeline.app.uploads import FORMATS, ImageFile, check_image, make_preview
from pipeline.app.work_queue import work_queue
from pipeline.errors import UserError, printable
from pipeline.generation.search import SearchParams
from pipeline.prediction.captioner import Captioner

Job = tuple[Any, ...]
"""A function, followed by its arguments, all hashable."""


def prepare(folders: Sequence[Path]) -> None:
    """Load the models and samples that all sessions share.

    Raises:
        UserError: A model cannot be loaded.
    """
    thumbnails()
    for folder in folders:
        load_captioner(folder)


def page() -> None:
    """Draw the page. The arguments of the command line are the model folders."""
    with st.sidebar:
        folders = _select_models([Path(argument) for argument in sys.argv[1:]])
    try:
        with st.spinner("Loading the model …"):
            captioners = {folder: load_captioner(folder) for folder in folders}
    except UserError as error:
        st.error(escape_markdown(str(error)))
        return
    with st.sidebar:
        st.subheader("Search", anchor=False)
        search = search_controls(captioners[folders[0]].search)
    _choose_image()
    image = st.session_state.setdefault("image", sample_images()[0])
    try:
        _register(image)
        check_image(image)
        _show_captions(image, captioners, search)
    except UserError as error:
        st.error(escape_markdown(str(error)))


def _select_models(folders: list[Path]) -> list[Path]:
    """Show the widgets that select a model and a second one, and return the selected folders."""
    first = st.selectbox("Model", folders, format_func=str)
    other_folders = [folder for folder in folders if folder != first]
    second = st.selectbox("Compare with", other_folders, index=None, format_func=str) if other_folders else None
    return [first, second] if second else [first]


def _choose_image() -> None:
    """Show the widgets that choose an image: file upload, clipboard and samples."""
    extensions = [extension for extensions in FORMATS.values() for extension in extensions]
    # A new key clears the widget after each upload; otherwise visitors would have to remove the last file first.
    key = f"upload {st.session_state.get('num_uploads', 0)}"
    st.file_uploader("Image", extensions, key=key, on_change=_use_upload, args=(key,), label_visibility="collapsed")
    pick_image(thumbnails(), _use_sample, _use_file)


def _show_captions(image: ImageFile, captioners: dict[Path, Captioner], search: SearchParams) -> None:
    """Caption the image with each model, and show the captions side by side.

    Jobs of this session that the page no longer needs are canceled.

    Args:
        image: The image.
        captioners: The models by folder.
        search: Search settings of all models.
    """
    columns = st.columns(len(captioners))
    viewers = [column.container() for column in columns]  # above the spinners
    jobs: dict[Job, Future[Any]] = {}
    try:
        with columns[0], st.spinner("Captioning …"):
            models = [captioner.config for captioner in captioners.values()]
            preview_futures = [_submit(jobs, make_preview, image, model.encoder.frame, model.view) for model in models]
            caption_futures = [
                _submit(jobs, captioner.caption, (image.content,), search) for captioner in captioners.values()
            ]
    finally:
        for job, future in st.session_state.get("jobs", {}).items():
            if job not in jobs:
                future.cancel()
        st.session_state["jobs"] = jobs
    for folder, column, viewer, preview_future, future in zip(
        captioners, columns, viewers, preview_futures, caption_futures, strict=True
    ):
        with column, st.spinner("Captioning …"):
            preview = preview_future.result()  # first, since its errors name the file
            [caption] = future.result()
        with viewer:
            if len(captioners) > 1:
                st.caption(escape_markdown(str(folder)))
            show_caption(preview, caption, key=f"viewer {folder}")


def _submit(jobs: dict[Job, Future[Any]], function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Queue a job, unless this session queued the same job when its page was last drawn.

    Args:
        jobs: The jobs of the current draw, to which the job is added.
        function: The function to call.
        arguments: Its arguments.
    """
    job = (function, *arguments)
    jobs[job] = st.session_state.get("jobs", {}).get(job) or work_queue().submit(partial(function, *arguments))
    return jobs[job]


def _use_upload(key: str) -> None:
    upload = st.session_state[key]
    st.session_state["num_uploads"] = st.session_state.get("num_uploads", 0) + 1
    if upload is not None:  # unless the browser has replaced the upload
        _use_file(upload.name, upload.getvalue())
        upload_store().remove_file(_session_id(), upload.file_id)


def _use_sample(index: int) -> None:
    st.session_state["image"] = sample_images()[index]


def _use_file(name: str, content: bytes) -> None:
    st.session_state["image"] = ImageFile(name=printable(name), content=content)


def _register(image: ImageFile) -> None:
    """Count the image towards the limits on memory, and drop it if there is no room."""
    try:
        upload_store().register_image(_session_id(), image)
    except UserError:
        del st.session_state["image"]
        raise


def _session_id() -> str:
    context = get_script_run_ctx()
    assert context is not None, "the page is drawn in a session"
    return context.session_id
