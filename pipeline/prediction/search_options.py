"""A flag for each search setting, made from the settings themselves."""

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typer.core import TyperCommand

from pipeline.errors import UserError


class SearchCommand(TyperCommand):
    """A command that also takes every field of `SearchParams` as a flag; `search_settings` gives what was asked for.

    They are looked up when the command is parsed, since that loads PyTorch, which `gridcap --help` should not.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters and those flags."""
        if not any(parameter.callback is _keep for parameter in self.params):
            self.params += _flags()
        return super().get_params(ctx)


def search_settings(ctx: typer.Context) -> Any:
    """Give the `SearchParams` that the flags of a `SearchCommand` ask for: the usual ones, but for what was given.

    Raises `UserError` that names each setting at fault.
    """
    from pipeline.generation.search import SearchParams
    from pipeline.params import check

    return check({**_usual(), **(ctx.obj or {})}, "search", SearchParams, "flags")


def _usual() -> dict[str, Any]:
    from pipeline.params import to_plain
    from pipeline.prediction.captioner import USUAL_SEARCH

    usual: dict[str, Any] = to_plain(USUAL_SEARCH)
    return usual


def _flags() -> list[Any]:
    from pipeline.generation.search import SearchParams

    fields: Mapping[str, Any] = SearchParams.__pydantic_fields__  # type: ignore[attr-defined]
    annotations: dict[str, Any] = {
        name: Annotated[
            str | None,
            typer.Option(
                help=" ".join(fields[name].description.split()),
                show_default=json.dumps(value).strip('"'),
                metavar="VALUE",
                rich_help_panel="Search",
            ),
        ]
        for name, value in _usual().items()
    }

    def settings(**_: Any) -> None:
        pass

    settings.__annotations__ = annotations
    settings.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    # Typer makes flags of functions alone.
    app = typer.Typer(add_completion=False)
    app.command()(settings)
    flags: list[Any] = typer.main.get_command(app).params
    for flag in flags:
        flag.expose_value, flag.callback = False, _keep
    return flags


def _keep(ctx: Any, flag: Any, value: str | None) -> None:
    if value is None:
        return
    try:
        ctx.ensure_object(dict)[flag.name] = YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise UserError(f"--{flag.name.replace('_', '-')}: {value!r} is no value") from error
