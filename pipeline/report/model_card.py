"""The model card: training data, encoder, scores and licenses of a model (Mitchell et al. 2019)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_atomically
from pipeline.decoder.model_io import CONFIG_FILE, History, ModelConfig, WarmStart

CARD_FILE = "model_card.md"

_VALIDATION_LABELS = {
    "val_loss": "loss under teacher forcing, nats per word",
    "val_accuracy": "token accuracy under teacher forcing",
    "val_bleu4": "BLEU-4",
    "val_cider": "CIDEr-D",
}

_INTRODUCTION = """\
# Model card

An image captioner trained with gridcap: an LSTM decoder with attention over image regions, on the features of a frozen
ResNet. It is meant for images like those it was trained on. On other images its captions are often wrong, and its
confidence does not show it.
"""
_LICENSES = """
## Licenses

gridcap's code is under the MIT license. The weights were learned from the images and captions named above, on features
of the encoder named above. Check the licenses of all of these before you distribute the model or use it commercially.
They may be narrower: Flickr8k is for research and teaching; COCO's captions are CC BY 4.0 and its photographs belong to
their authors; torchvision's weights were trained on ImageNet, which is for research."""


def write_model_card(
    path: Path,
    config: ModelConfig,
    history: History,
    refine_history: History,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the card of a model. The same arguments give the same bytes.

    Args:
        path: Output Markdown file.
        config: Configuration of the model.
        history: Metrics of each epoch of `train`.
        refine_history: Metrics of each epoch of `refine`, the first of which is epoch 0; empty if the model is not
            refined.
        scores: Content of `scores.json`, or of `gridcap score --json`; None omits evaluation scores.
    """
    write_atomically(path, "\n".join(_lines(config, history, refine_history, scores)) + "\n")


def _lines(
    config: ModelConfig, history: History, refine_history: History, scores: Mapping[str, Any] | None
) -> Iterator[str]:
    encoder, decoder, data = config.encoder, config.decoder, config.data
    yield _INTRODUCTION
    yield "| | |"
    yield "| --- | --- |"
    yield f"| training run | `{config.fingerprint}` |"
    yield f"| training data | {_code(config.dataset)}: {_images(data.num_images)}, {data.num_captions:,} captions |"
    yield from _initial_weights(config.warm_start)
    if data.num_text_captions:
        yield f"| captions without images | {data.num_text_captions:,} |"
    yield f"| checkpoint | epoch {config.epoch} of {len(history)}, {_selection(config.selected_by)} |"
    if config.refinement is not None:
        refinement, num_epochs = config.refinement, len(refine_history) - 1
        yield (
            f"| self-critical training | of training run `{refinement.trained_fingerprint}`: "
            f"epoch {refinement.epoch} of {num_epochs}, {_selection(refinement.selected_by)} |"
        )
    yield (
        f"| encoder | {encoder.architecture} up to {encoder.layer}, {encoder.image_height} x {encoder.image_width} px "
        f"({encoder.resize}, {config.view}), "
        f"{encoder.precision}: {encoder.grid_height} x {encoder.grid_width} regions of {encoder.channels} channels |"
    )
    yield f"| encoder weights | {_code(config.encoder_weights)}, SHA-256 `{encoder.weights_digest}` |"
    sizes = f"hidden size {decoder.hidden_size}, embedding size {decoder.embedding_size}"
    yield f"| decoder | `{decoder.kind}`: {sizes}, attention size {decoder.attention_size} |"
    yield f"| vocabulary | digest `{config.vocabulary_digest}` |"
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in config.versions.items())} |"
    yield f"\n`{CONFIG_FILE}` has the same facts in machine-readable form.\n"
    if config.refinement is None:
        yield from _validation_lines(config, config.selected_by, history[config.epoch - 1])
    else:
        yield from _validation_lines(config, config.refinement.selected_by, refine_history[config.refinement.epoch])
    if scores is not None:
        yield from _evaluation_lines(scores)
    yield _LICENSES


def _initial_weights(warm_start: WarmStart | None) -> Iterator[str]:
    """Yield a row for each model that the weights of the next one started from."""
    while warm_start is not None:
        yield (
            f"| initial weights | of training run `{warm_start.fingerprint}`: {warm_start.summary}; trained on"
            f" {_code(warm_start.dataset)} with encoder weights {_code(warm_start.encoder_weights)} |"
        )
        warm_start = warm_start.warm_start


def _validation_lines(config: ModelConfig, selected_by: str, metrics: Mapping[str, float | None]) -> Iterator[str]:
    yield "## Validation scores\n"
    yield f"On {_images(config.data.num_val_images)} that the decoder was not trained on."
    if selected_by != "last":
        yield "The epoch was selected on these images, so the scores are slightly optimistic."
    yield "Captions are generated greedily. BLEU-4 (closest reference length, no smoothing) and CIDEr-D are corpus"
    yield "scores on the tokens of `tokenize`; `<unk>` never matches.\n"
    yield "| metric | value |"
    yield "| --- | --- |"
    for key, label in _VALIDATION_LABELS.items():
        value = metrics[key]
        yield f"| {label} | {'not defined' if value is None else f'{value:.4f}'} |"


def _evaluation_lines(scores: Mapping[str, Any]) -> Iterator[str]:
    metrics = [name for name in scores["protocol"] if isinstance(scores.get(name), float | int)]
    intervals, signature = scores.get("intervals", {}), scores.get("signature", {})
    yield "\n## Evaluation scores\n"
    if "num_images" in scores:
        num_skipped = scores.get("num_skipped_images", 0)
        skipped = f" {num_skipped:,} more are left out, since their files cannot be decoded." if num_skipped else ""
        yield f"On {_images(scores['num_images'])}.{skipped}\n"
    yield "| metric | value | 95% interval |"
    yield "| --- | --- | --- |"
    for name in metrics:
        low_to_high = " to ".join(f"{end:.4f}" for end in intervals.get(name, []))
        yield f"| {name} | {scores[name]:.4f} | {low_to_high} |"
    for name, reasons in scores.get("unavailable", {}).items():
        yield f"| {name} | {' '.join(reasons)} | |"
    published = scores.get("published", [])
    if published:
        columns = list(dict.fromkeys(name for row in published for name in row["scores"]))
        yield "\nPublished scores to compare with; encoders, tokenizers and splits can differ:\n"
        yield f"| system | {' | '.join(columns)} | data | notes | source |"
        yield f"| --- |{' --- |' * len(columns)} --- | --- | --- |"
        for row in published:
            values = [f"{row['scores'][name]:.3f}" if name in row["scores"] else "" for name in columns]
            facts = row["system"], *values, row["data"], row["notes"] or "", row["source"]
            yield f"| {' | '.join(fact.replace('|', ' ') for fact in facts)} |"
    if signature:
        yield "\nSignatures, to quote with the scores:\n"
        yield "```text"
        yield from (line for name in metrics for line in signature.get(name, []))
        yield "```"


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _selection(selected_by: str) -> str:
    return "the last one" if selected_by == "last" else f"selected by `{selected_by}`"


def _code(name: str | None) -> str:
    return "unknown" if name is None else f"`{name}`"
