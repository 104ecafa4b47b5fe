"""Command-line options for the settings of `SearchParams`.

They are declared here because importing `SearchParams` imports PyTorch, which `--help` must not do.
`tests/test_search_options.py` compares them with the fields of `SearchParams` and with `DEFAULT_SEARCH`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pipeline.generation.search import SearchParams


def _option(help_text: str, default: object, *names: str, **bounds: Any) -> Any:
    """Declare an option of `gridcap predict`.

    Args:
        help_text: Help of the option.
        default: Value for models without recorded settings.
        names: Names of the flag; by default the name of the parameter.
        bounds: `min` and `max` of a number.
    """
    return typer.Option(
        *names, help=help_text, show_default=f"recorded, else {default}", rich_help_panel="Search settings", **bounds
    )


Method = Annotated[Literal["beam", "sample"] | None, _option("Decoding method: beam search or sampling.", "beam")]
BeamSize = Annotated[
    int | None, _option("Number of beams; 1 is greedy search. Must be 1 for sampling.", 5, min=1, max=256)
]
NumGroups = Annotated[
    int | None,
    _option("Number of groups in diverse beam search; divides the beam size. 1 disables it.", 1, min=1, max=256),
]
DiversityPenalty = Annotated[
    float | None,
    _option(
        "Penalty, in nats, for each caption of an earlier group that chose the same word at this step.",
        0.0,
        min=0,
        max=1000,
    ),
]
GuidanceScale = Annotated[
    float | None,
    _option(
        "Factor of the difference that the image makes to the log-probabilities of words; above 1 captions are more"
        " specific.",
        1.0,
        min=1,
        max=100,
    ),
]
Temperature = Annotated[
    float | None,
    _option("Sampling temperature; above 1 captions vary more.", 1.0, min=0.01, max=100),
]
TopK = Annotated[int | None, _option("Sample from the k most likely words; 0 disables it.", 0, min=0, max=1_000_000)]
TopP = Annotated[
    float | None,
    _option(
        "Sample from the smallest set of words whose probabilities add up to this (nucleus sampling); 1 disables it.",
        1.0,
        min=0,
        max=1,
    ),
]
Seed = Annotated[int | None, _option("Sampling seed.", 1, min=0)]
MinLength = Annotated[int | None, _option("Minimum caption length in words.", 0, min=0, max=1000)]
MaxLength = Annotated[int | None, _option("Maximum caption length in words.", 30, min=1, max=1000)]
LengthNormalization = Annotated[
    Literal["none", "average", "gnmt"] | None,
    _option(
        "Divisor of the log-probability when captions are ranked: none, length^alpha, or ((5 + length) / 6)^alpha.",
        "average",
    ),
]
LengthAlpha = Annotated[
    float | None,
    _option(
        "Exponent of the length normalization: 0 favors short captions, 1 long ones. Must be 0 with `none`.",
        0.5,
        min=0,
        max=1,
    ),
]
NoRepeatNgramSize = Annotated[
    int | None, _option("Size of n-grams that may occur only once in a caption; 0 disables it.", 4, min=0, max=1000)
]
AllowUnk = Annotated[bool | None, _option("Allow <unk> in captions.", "no", "--allow-unk/--no-allow-unk")]
NBest = Annotated[
    int | None, _option("Captions printed for each image: the best of the beam, or samples.", 1, min=1, max=1000)
]
Precision = Annotated[
    Literal["float32", "bfloat16"] | None,
    _option("Precision of the decoder's matrix products; bfloat16 is faster and less exact.", "float32"),
]


def override(search: "SearchParams", **options: Any) -> "SearchParams":
    """Replace single search settings.

    Args:
        search: The settings to start from.
        options: New values by field of `SearchParams`; None keeps the value.

    Raises:
        UserError: The resulting settings contradict each other.
    """
    from pipeline.generation.search import SearchParams
    from pipeline.params import check, to_plain

    changes = {name: value for name, value in options.items() if value is not None}
    return check({**to_plain(search), **changes}, "search settings", SearchParams, "command line")
