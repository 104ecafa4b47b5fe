"""The command `gridcap`.

Modules that are slow to import are imported inside the commands, so that `--help` is fast.
"""

import json
import os
import re
import shlex
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline import __version__, errors
from pipeline.device import DeviceOption
from pipeline.prediction import search_options

Model = Annotated[Path, typer.Option(help="Model folder, from `refine` or `gridcap export`.")]
EncoderWeights = Annotated[
    Path | None,
    typer.Option(
        help="File with the encoder's weights.",
        show_default="from the model folder, else the file that `encode` read, else torchvision's cache",
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Download torchvision's weights if they are missing.")]
Ensemble = Annotated[
    Path | None,
    typer.Option(
        help="Folder of additional models; averages the word probabilities of all models.", show_default="none"
    ),
]

Tokenizer = Annotated[
    Literal["spacy", "ptb"],
    typer.Option(help="Tokenizer: spacy as in `tokenize`, or ptb as in coco-caption (needs Java)."),
]
Language = Annotated[
    str, typer.Option(help="Language of the captions, by its code in spaCy, as in `tokenize`; ptb is for English.")
]
Meteor = Annotated[bool, typer.Option("--meteor/--no-meteor", help="Compute METEOR; for English, needs Java.")]
Spice = Annotated[
    bool,
    typer.Option(
        "--spice/--no-spice", help="Compute SPICE; for English, needs Java 8 to 14 and Stanford CoreNLP 3.6.0."
    ),
]
BootstrapSamples = Annotated[int, typer.Option(min=100, max=100_000, help="Bootstrap samples for 95% intervals.")]
Seed = Annotated[int, typer.Option(min=0, help="Bootstrap seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with the protocol of every score.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write the scores to, as --json prints them.")]

DEFAULT_MODEL = Path("data/model")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image captioning with attention over image regions.",
    epilog="First steps: in a clone, `make repro` trains a captioner in about six minutes. Then run `gridcap predict`"
    " on any image in data/scenes/rendered/images. `gridcap use flickr8k` switches to Flickr8k.",
)


def main() -> None:
    """Run the application; `pipeline.console` is the console script."""
    # Threads that decode images share the cores with those of the encoder, as in stages/__init__.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Pillow's warnings would name lines of Pillow. Unreadable images raise errors.
    warnings.filterwarnings("ignore", module="PIL")
    errors.run(app)


def _print_version(is_set: bool) -> None:
    if is_set:
        print(f"gridcap {__version__}")
        raise typer.Exit


@app.callback()
def gridcap(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle options before a command."""


@app.command()
def predict(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Image files, folders of images, or - for standard input.")
    ],
    model: Model = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image.")] = False,
    attention: Annotated[
        Path | None,
        typer.Option(
            help="Plot the attention of each word: to a folder, one PNG per image, or to a .png or .svg file for one"
            " image.",
            show_default="none",
        ),
    ] = None,
    ensemble: Ensemble = None,
    encoder_weights: EncoderWeights = None,
    download: Download = False,
    device: DeviceOption = "auto",
    method: search_options.Method = None,
    beam_size: search_options.BeamSize = None,
    num_groups: search_options.NumGroups = None,
    diversity_penalty: search_options.DiversityPenalty = None,
    guidance_scale: search_options.GuidanceScale = None,
    temperature: search_options.Temperature = None,
    top_k: search_options.TopK = None,
    top_p: search_options.TopP = None,
    seed: search_options.Seed = None,
    min_length: search_options.MinLength = None,
    max_length: search_options.MaxLength = None,
    length_normalization: search_options.LengthNormalization = None,
    length_alpha: search_options.LengthAlpha = None,
    no_repeat_ngram_size: search_options.NoRepeatNgramSize = None,
    allow_unk: search_options.AllowUnk = None,
    n_best: search_options.NBest = None,
    precision: search_options.Precision = None,
) -> None:
    """Caption images. Prints each caption with its confidence.

    The default search settings are those recorded by `generate` with the model's captions. Options override single
    settings. Exits with status 1 if an image cannot be read.
    """
    from pipeline.prediction.captioner import Captioner
    from pipeline.prediction.inputs import find_inputs
    from pipeline.prediction.predict import drawing_paths, predict

    inputs = find_inputs(images)
    drawings = None if attention is None else drawing_paths(inputs, attention)
    captioner = Captioner.load(
        model, ensemble=ensemble, encoder_weights=encoder_weights, download=download, device=device
    )
    search = search_options.override(
        captioner.search,
        method=method,
        beam_size=beam_size,
        num_groups=num_groups,
        diversity_penalty=diversity_penalty,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        min_length=min_length,
        max_length=max_length,
        length_normalization=length_normalization,
        length_alpha=length_alpha,
        no_repeat_ngram_size=no_repeat_ngram_size,
        allow_unk=allow_unk,
        n_best=n_best,
        precision=precision,
    )
    if predict(captioner, inputs, search, as_json, drawings):
        raise typer.Exit(1)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Model folder, from `refine`.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    with_encoder: Annotated[bool, typer.Option("--with-encoder", help="Include the encoder's weights.")] = False,
    scores: Annotated[
        Path | None,
        typer.Option(help="Scores for the model card, such as results/metrics/scores.json."),
    ] = None,
    encoder_weights: EncoderWeights = None,
    download: Download = False,
) -> None:
    """Export a model as a self-contained, verified folder."""
    from pipeline.prediction.export import export
    from pipeline.report.model_card import CARD_FILE

    export(model, out, with_encoder, scores, encoder_weights, download)
    print(f"{out}: exported. Run `gridcap predict --model {out} IMAGE`.")
    if not with_encoder:
        print(f"{out}: does not include the encoder's weights. Export with --with-encoder to include them.")
    if scores is None:
        print(f"{out / CARD_FILE}: has no test scores. Export with --scores to include them.")


@app.command()
def use(
    preset: Annotated[str, typer.Argument(help="Name of a preset in the folder presets, or path of a YAML file.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values to set after the preset, such as train.seed=3."),
    ] = None,
    params: Annotated[Path, typer.Option(help="Params file to change.")] = Path("params.yaml"),
) -> None:
    """Apply a preset to params.yaml."""
    from pipeline import presets
    from pipeline.params import load_key

    path = presets.find_preset(preset, params.parent / "presets")
    presets.use(path, assignments or [], params)
    weights: Path = load_key(params, "encode.weights", Path)
    if re.fullmatch(r"resnet\d+-[0-9a-f]{8}\.pth", weights.name) and not (params.parent / weights).is_file():
        print(f"{weights}: no such file. Run `gridcap download weights:{weights.name.partition('-')[0]}`.")
    print(f"{params}: set to {path}. Run `dvc repro`.")


@app.command()
def download(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of a recipe in the folder recipes, path of a YAML file, or weights of torchvision, such as"
            " weights:resnet50 or weights:resnet50/IMAGENET1K_V1.",
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder for the dataset or weights.", show_default="from the recipe; data/weights"),
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(help="URL of a folder with the files, used instead of their publishers' servers.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="File of the recipe to download; repeat for several.")] = None,
    archives: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep archives in, or where they already are.", show_default="removed after unpacking"
        ),
    ] = None,
) -> None:
    """Download a dataset, or an encoder's pretrained weights. Run again to resume.

    Every file is verified by size and digest before it is unpacked.
    """
    kind, _, weights = name.partition(":")
    if kind == "weights" and weights:
        from pipeline.features.pretrained import download_weights

        if only or archives:
            raise errors.UserError(f"{name}: weights are one file. Omit --only and --archives.")
        path = download_weights(weights, root or Path("data/weights"), mirror)
        print(path)
        print(
            f"Use it with `gridcap use PRESET encode.architecture={weights.partition('/')[0]} encode.weights={path}`."
        )
        return
    from pipeline.recipes import DatasetDownload, find_recipe, read_recipe

    recipe = read_recipe(find_recipe(name, Path("recipes")))
    folder = root or Path(recipe.root)
    dataset = DatasetDownload(recipe, folder, archives, mirror, only or [])
    for line in dataset.describe():
        print(errors.printable(line), flush=True)
    dataset.run()
    print(f"{folder}: complete.")
    if recipe.preset:
        command = ["gridcap", "use", recipe.preset, f"dataset.root={folder}", *recipe.settings]
        print(f"Use it with `{shlex.join(command)}`.")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="HDF5 file of the pipeline, or folder with such files.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify the SHA-256 of every shard of a feature store instead.")
    ] = False,
    image: Annotated[
        int | None,
        typer.Option(
            help="Plot the image with this id and its grid, from a feature store, instead; needs --out.",
            show_default="none",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file to write, for --image.")] = None,
    prepared: Annotated[Path, typer.Option(help="Folder with records.jsonl, for --image.")] = Path("data/prepared"),
    params: Annotated[Path, typer.Option(help="Params file with section dataset, for --image.")] = Path("params.yaml"),
) -> None:
    """Show the attributes, datasets and first rows of an artifact."""
    from pipeline import inspection

    if (image is None) != (out is None):
        raise errors.UserError("--image and --out: only one is set. Set both.")
    if verify:
        print(inspection.verify(path))
    if image is not None and out is not None:
        from pipeline.captions.sources.dataset import DatasetParams
        from pipeline.features.visualize import draw_grid
        from pipeline.params import load

        dataset = load(params, "dataset", DatasetParams)
        title = draw_grid(inspection.open_store(path), image, prepared, dataset.image_dir, out)
        print(f"{out}: {inspection.format_value(title, max_length=1000)}")
    if not verify and image is None:
        for line in inspection.describe(path):
            print(errors.printable(line))


@app.command()
def stats(
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")] = Path("data/prepared"),
    tokens: Annotated[Path, typer.Option(help="Folder of tokens, from `tokenize`, if it exists.")] = Path(
        "data/tokens"
    ),
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`, if it exists.")] = Path("data/features"),
    params: Annotated[Path, typer.Option(help="Params file with section dataset.")] = Path("params.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a dataset: sizes, captions, words, and leaks between its splits."""
    from dataclasses import asdict

    from pipeline.captions.sources.dataset import DatasetParams
    from pipeline.evaluation.dataset_stats import compute_stats, stats_lines
    from pipeline.params import load

    image_dir = load(params, "dataset", DatasetParams).image_dir
    result = compute_stats(prepared, image_dir, tokens, features)
    text = json.dumps(asdict(result), indent=2, ensure_ascii=False)
    for line in text.split("\n") if as_json else stats_lines(result):
        print(errors.printable(line))


@app.command()
def score(
    hypotheses: Annotated[
        Path,
        typer.Argument(
            help="Captions in COCO's results format, from `gridcap predict --json`, or a folder from `generate`."
        ),
    ],
    references: Annotated[Path, typer.Argument(help="COCO annotations, or a folder from `prepare`.")],
    tokenizer: Tokenizer = "spacy",
    language: Language = "en",
    meteor: Meteor = True,
    spice: Spice = False,
    bootstrap_samples: BootstrapSamples = 1000,
    seed: Seed = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Score generated captions against references, also by the subsets of the references.

    References of other images are ignored.
    """
    from pipeline.evaluation import scoring

    scores = scoring.score(
        hypotheses,
        references,
        tokenizer=tokenizer,
        language=language,
        meteor=meteor,
        spice=spice,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    _print_scores(scores, scoring.score_lines(scores), as_json, out)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Captions in COCO's results format, or a folder from `generate`.")],
    b: Annotated[Path, typer.Argument(help="Captions of the same images, to compare with A.")],
    references: Annotated[Path, typer.Option(help="COCO annotations, or a folder from `prepare`.")] = Path(
        "data/prepared"
    ),
    tokenizer: Tokenizer = "spacy",
    language: Language = "en",
    meteor: Meteor = True,
    spice: Spice = False,
    bootstrap_samples: BootstrapSamples = 1000,
    seed: Seed = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Compare the scores of two sets of captions: B minus A, with paired 95% intervals."""
    from pipeline.evaluation import scoring

    differences = scoring.compare(
        a,
        b,
        references,
        tokenizer=tokenizer,
        language=language,
        meteor=meteor,
        spice=spice,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )
    _print_scores(differences, scoring.compare_lines(differences), as_json, out)


def _print_scores(scores: dict[str, Any], lines: list[str], as_json: bool, out: Path | None) -> None:
    from pipeline.artifacts import write_json

    # Print first, so that no score is lost if the file cannot be written.
    for line in json.dumps(scores, indent=2, ensure_ascii=False).split("\n") if as_json else lines:
        print(errors.printable(line))
    if out is not None:
        try:
            write_json(out, scores)
        except OSError as error:
            raise errors.write_error(error, out, "Name another file.") from error


@app.command("app")
def serve(
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", help="Model folder; repeat for several.", show_default=str(DEFAULT_MODEL)),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free port.")] = 8501,
) -> None:
    """Serve the web app: caption images, explore attention, monitor training."""
    from pipeline.app.serve import serve

    serve(models or [], DEFAULT_MODEL, host, port)


@app.command()
def repair(
    repository: Annotated[Path, typer.Argument(help="Root of the repository; no `dvc` may be running in it.")] = Path(),
) -> None:
    """Repair DVC lock files truncated by a crash. `make repro` runs this first."""
    from pipeline import dvc_repair

    for path in dvc_repair.repair(repository):
        print(f"{errors.printable(str(path))}: repaired. Run `dvc repro` to restore its entries.")
