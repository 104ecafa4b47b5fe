"""The model card: what a model folder holds, for the people that it travels to. After Mitchell et al. 2019."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_atomically
from pipeline.decoder.model_io import CONFIG_FILE, ModelConfig

CARD_FILE = "model_card.md"

_NAMES = {
    "val_loss": "loss under teacher forcing, nats a word",
    "val_accuracy": "token accuracy under teacher forcing",
    "val_bleu4": "BLEU-4",
    "val_cider": "CIDEr-D",
}

_INTRODUCTION = """\
# Model card

An image captioner of gridcap: a decoder that attends to regions of a picture, word by word, after Show, Attend and Tell
(Xu et al. 2015), on the grids of a frozen encoder. It is made for pictures like those it was trained on; of others it
speaks with the same confidence, and wrongly.
"""
_LICENSES = """
## Licenses

gridcap's code is under the MIT license. These weights were learned from the images and captions named above, and the
grids come from the encoder's weights. Whoever passes the model on or earns money with it should know the licenses of
all of these, which may be narrower: Flickr8k is for research and teaching, COCO's captions are CC BY 4.0 and its
photographs their authors', and torchvision's weights were trained on ImageNet, which is for research."""


def write_model_card(
    path: Path, config: ModelConfig, history: Sequence[Mapping[str, float]], scores: Mapping[str, Any] | None = None
) -> None:
    """Write the model card; the same model gives the same bytes.

    Args:
        path: The file.
        config: Configuration of the model.
        history: Metrics of each epoch of training.
        scores: Value and protocol of each test score; None if the model was not evaluated.
    """
    write_atomically(path, "\n".join(_lines(config, history, scores)) + "\n")


def _lines(
    config: ModelConfig, history: Sequence[Mapping[str, float]], scores: Mapping[str, Any] | None
) -> Iterator[str]:
    encoder, data = config.encoder, config.data
    last = config.selected_by == "last"
    chosen = "the last" if last else f"by `{config.selected_by}`"
    flattery = "" if last else ", but that chose its epoch, which flatters the scores a little"
    yield _INTRODUCTION
    yield "| | |"
    yield "| --- | --- |"
    yield f"| training run | `{config.fingerprint}` |"
    yield f"| training data | {_told(config.dataset)}: {data.num_images:,} images with {data.num_captions:,} captions |"
    yield f"| weights kept | after epoch {config.epoch} of {len(history)}, {chosen} |"
    yield (
        f"| encoder | {encoder.architecture} up to {encoder.layer}, of {encoder.image_size} px ({config.view}), "
        f"{encoder.precision}: {encoder.grid_height} x {encoder.grid_width} regions of {encoder.channels} channels |"
    )
    yield f"| encoder's weights | {_told(config.encoder_weights)}, digest `{encoder.weights_digest}` |"
    yield f"| vocabulary | digest `{config.vocabulary_digest}` |"
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in config.versions.items())} |"
    yield f"\n`{CONFIG_FILE}` has the same and more for programs.\n"
    yield "## Scores in validation\n"
    yield f"Of {data.num_val_images:,} images that the decoder was not trained on{flattery}."
    yield "Captions were searched greedily; BLEU-4 (closest reference, no smoothing) and CIDEr-D are of whole corpora,"
    yield "on the tokens that the pipeline trains on, `<unk>` matching nothing.\n"
    yield "| score | value |"
    yield "| --- | --- |"
    kept = history[config.epoch - 1]
    for name, told in _NAMES.items():
        yield f"| {told} | {kept[name]:.4f} |"
    if scores is not None:
        yield "\n## Scores in evaluation\n"
        yield "| score | value | protocol |"
        yield "| --- | --- | --- |"
        measured = {name: score for name, score in scores.items() if isinstance(score, Mapping) and "value" in score}
        protocols = list(dict.fromkeys("; ".join(score.get("protocol", ())) for score in measured.values()))
        for name, score in measured.items():
            number = protocols.index("; ".join(score.get("protocol", ()))) + 1
            yield f"| {name} | {score['value']:.4f} | {number} |"
        yield ""
        yield from (f"{number}. {protocol}" for number, protocol in enumerate(protocols, start=1))
    yield _LICENSES


def _told(name: str | None) -> str:
    return "not told" if name is None else f"`{name}`"
