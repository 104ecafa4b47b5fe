"""The user's commands.

What is heavy to import is imported inside the command that needs it: `gridcap --help` answers at once.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline import __version__, errors
from pipeline.prediction.search_options import SearchCommand, search_settings

Words = Annotated[
    Literal["spacy", "ptb"],
    typer.Option(help="Whose words are compared: ptb, coco-caption's, which needs Java, or plain, the pipeline's own."),
]
Meteor = Annotated[bool, typer.Option("--meteor/--no-meteor", help="Score by METEOR too; needs Java.")]
Spice = Annotated[
    bool, typer.Option("--spice/--no-spice", help="Score by SPICE too; needs Java 8 to 14 and Stanford CoreNLP 3.6.0.")
]
Resamples = Annotated[int, typer.Option(min=100, help="Resamples of the images that 95% intervals are made of.")]
Seed = Annotated[int, typer.Option(min=0, help="Fixes the resamples.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with the protocol of every score.")]
Out = Annotated[Path | None, typer.Option(help="File for the same JSON.")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image captioners that look at the right part of the picture for each word.",
    epilog="New here? In a clone, `make repro` trains a captioner in five minutes; then try `gridcap predict` with any"
    " of the pictures in data/scenes/rendered/images. `gridcap use flickr8k` is the way to photographs.",
)

Model = Annotated[Path, typer.Option(help="Model folder, as `train` or `gridcap export` wrote it.")]
EncoderWeights = Annotated[
    Path | None,
    typer.Option(help="The encoder's weights, where they are neither in the model folder nor where `encode` had them."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch weights of torchvision that are not cached.")]
Ensemble = Annotated[
    Path | None, typer.Option(help="Folder of more model folders, whose probabilities are averaged with the model's.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")]

MODEL = Path("data/model")


def main() -> None:
    """Run the console script `gridcap`."""
    # As in the stages: threads that decode pictures share the cores with the encoder's.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Pillow's are for programmers, and name a line of its own; what a picture lacks, errors tell.
    warnings.filterwarnings("ignore", module="PIL")
    errors.run(app)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"gridcap {__version__}")
        raise typer.Exit


@app.callback()
def gridcap(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the flags that belong to no command."""


@app.command()
def use(
    preset: Annotated[str, typer.Argument(help="Name of a preset in the folder presets, or a YAML file.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Single values, such as train.seed=3."),
    ] = None,
    params: Annotated[Path, typer.Option(help="The params file to change.")] = Path("params.yaml"),
) -> None:
    """Set params.yaml to a preset; `dvc repro` then runs what that changes."""
    from pipeline import presets

    path = presets.find_preset(preset, params.parent / "presets")
    presets.use(path, assignments or [], params)
    print(f"{params} is set to {path}; `dvc repro` runs what that changes")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An HDF5 file of the pipeline, or a folder with such files.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every shard of a feature store with its index, instead.")
    ] = False,
    image: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Draw this image of a feature store beside its grid, instead; needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file for the image and its grid.")] = None,
    prepared: Annotated[Path, typer.Option(help="Folder whose records.jsonl names the image's file.")] = Path(
        "data/prepared"
    ),
    params: Annotated[Path, typer.Option(help="Params file whose section dataset names the images' folder.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Show what an artifact holds: its attributes, its datasets and a few rows, decoded."""
    from pipeline import inspection

    if (image is None) != (out is None):
        raise errors.UserError("--image and --out go together; name an image's id and a PNG file for its grid")
    if verify:
        print(inspection.verify(path))
    if image is not None and out is not None:
        from pipeline.captions.sources.dataset import DatasetParams
        from pipeline.features.visualize import draw_grid
        from pipeline.params import load

        dataset = load(params, "dataset", DatasetParams)
        title = draw_grid(inspection.open_store(path), image, prepared, dataset.root / dataset.images, out)
        print(f"{out}: {inspection.printable(title, max_length=1000)}")
    if not verify and image is None:
        for line in inspection.describe(path):
            print(line)


@app.command(cls=SearchCommand)
def predict(
    ctx: typer.Context,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Pictures, folders of pictures, or - for standard input.")
    ],
    model: Model = MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a picture, with all scores.")] = False,
    attention: Annotated[
        Path | None, typer.Option(help="Folder for a strip a picture of where the captioner looked for each word.")
    ] = None,
    ensemble: Ensemble = None,
    encoder_weights: EncoderWeights = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Caption pictures; a caption's confidence stands behind it. Ends with status 1 where one could not be read."""
    from pipeline.prediction.captioner import Captioner
    from pipeline.prediction.inputs import find_inputs
    from pipeline.prediction.predict import predict

    search = search_settings(ctx)
    inputs = find_inputs(images)
    captioner = Captioner.load(
        model, ensemble=ensemble, encoder_weights=encoder_weights, download=download, device=device
    )
    if predict(captioner, inputs, search, as_json, attention):
        raise typer.Exit(1)


@app.command(cls=SearchCommand)
def attend(
    ctx: typer.Context,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture, or - for standard input.")],
    out: Annotated[Path, typer.Option(help="PNG or SVG file for the strip.")],
    model: Model = MODEL,
    ensemble: Ensemble = None,
    encoder_weights: EncoderWeights = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Draw where the captioner looked for each word of a picture's caption."""
    from pipeline.prediction.captioner import Captioner
    from pipeline.prediction.inputs import find_inputs
    from pipeline.prediction.predict import draw

    if out.suffix.lower() not in (".png", ".svg"):
        raise errors.UserError(f"{out}: is no name for a PNG or SVG file; let --out end in .png or .svg")
    search = search_settings(ctx)
    one, *others = find_inputs([image])
    if others:
        raise errors.UserError(f"{image}: is a folder; name one picture, or use `gridcap predict --attention`")
    captioner = Captioner.load(
        model, ensemble=ensemble, encoder_weights=encoder_weights, download=download, device=device
    )
    [caption] = captioner.stream([one.source], search, [one.name])
    if isinstance(caption, errors.UserError):
        raise caption
    draw(captioner, one, caption, out)
    print(f"{out}: {caption.text}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Model folder, as `train` wrote it.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    with_encoder: Annotated[bool, typer.Option("--with-encoder", help="Put the encoder's weights in as well.")] = False,
    scores: Annotated[
        Path | None, typer.Option(help="Scores for the model's card, such as results/metrics/scores.json.")
    ] = None,
    encoder_weights: EncoderWeights = None,
    download: Download = False,
) -> None:
    """Copy a model into a folder that travels: whole, checked, with what it needs elsewhere."""
    from pipeline.prediction.export import export
    from pipeline.report.model_card import CARD_FILE

    export(model, out, with_encoder, scores, encoder_weights, download)
    if with_encoder:
        print(f"{out}: `gridcap predict --model {out} IMAGE` captions with it; its encoder's weights are in it")
    else:
        print(
            f"{out}: does not hold its encoder's weights, which `gridcap predict --model {out} IMAGE` must find where"
            " `encode` had them or be told by --encoder-weights; export with --with-encoder to take them along"
        )
    if scores is None:
        print(f"{out / CARD_FILE}: tells no scores of other images than validation's; export with --scores to add them")


@app.command("app")
def serve(
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", help="Model folder, data/model unless named; give it again for each of several."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve; 0 takes a free one.")] = 8501,
) -> None:
    """Caption pictures in the browser, see where the captioner looked for each word, and watch a training run."""
    from pipeline.app.serve import serve

    serve(models or [], host, port)


@app.command()
def score(
    hypotheses: Annotated[Path, typer.Argument(help="Captions in COCO's results format, or a folder from generate.")],
    references: Annotated[Path, typer.Argument(help="COCO's annotations, or a folder from prepare.")],
    tokenizer: Words = "spacy",
    meteor: Meteor = True,
    spice: Spice = False,
    bootstrap_samples: Resamples = 1000,
    seed: Seed = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Score captions against references, as coco-caption does: the images that have a caption, by ptb's words."""
    from pipeline.evaluation import scoring
    from pipeline.metrics.bootstrap import Resampling

    resampling = Resampling(bootstrap_samples=bootstrap_samples, seed=seed)
    found = scoring.score(hypotheses, references, tokenizer, meteor, spice, resampling)
    _tell(found, scoring.score_lines(found), as_json, out)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Captions in COCO's results format, or a folder from generate.")],
    b: Annotated[Path, typer.Argument(help="Other captions of the same images.")],
    references: Annotated[Path, typer.Option(help="COCO's annotations, or a folder from prepare.")] = Path(
        "data/prepared"
    ),
    tokenizer: Words = "spacy",
    meteor: Meteor = True,
    spice: Spice = False,
    bootstrap_samples: Resamples = 1000,
    seed: Seed = 1,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tell by how much B's scores differ from A's, with paired 95% intervals, and which differences are noise."""
    from pipeline.evaluation import scoring
    from pipeline.metrics.bootstrap import Resampling

    resampling = Resampling(bootstrap_samples=bootstrap_samples, seed=seed)
    found = scoring.compare(a, b, references, tokenizer, meteor, spice, resampling)
    _tell(found, scoring.compare_lines(found), as_json, out)


def _tell(found: dict[str, Any], lines: list[str], as_json: bool, out: Path | None) -> None:
    from pipeline.artifacts import write_json

    # First, so that a file that cannot be written takes nothing away.
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))
    if out is not None:
        try:
            write_json(out, found)
        except OSError as error:
            raise errors.UserError(f"{out}: cannot be written ({error.strerror}); name another file") from error


@app.command()
def repair(
    repository: Annotated[Path, typer.Argument(help="The repository, in which no `dvc` runs.")] = Path(),
) -> None:
    """Put right what a kill left half written of DVC's own lock files; `make repro` does this first."""
    from pipeline import dvc_repair

    for path in dvc_repair.repair(repository):
        print(f"{path} had been cut by a kill; `dvc repro` finds again what it had recorded")
