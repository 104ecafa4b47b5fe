"""Scores of caption files (`gridcap score`), and the differences between two of them (`gridcap compare`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.captions.languages import ENGLISH
from pipeline.errors import UserError
from pipeline.evaluation.coco_files import read_references, read_results, select_scored
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import (
    CORPUS_SCORES,
    compute_metrics,
    group_subsets,
    paired_differences,
    provenance,
    summarize_scores,
)
from pipeline.metrics.tokenizers import TokenizerName, build_corpora


def score(
    hypotheses: Path | str,
    references: Path | str,
    *,
    tokenizer: TokenizerName = "spacy",
    language: str = ENGLISH,
    meteor: bool = True,
    spice: bool = False,
    bootstrap_samples: int = 1000,
    seed: int = 1,
) -> dict[str, Any]:
    """Score the captions of a results file.

    Args:
        hypotheses: COCO results file, output of `gridcap predict --json`, or a folder written by `generate`.
        references: COCO annotations file, or a folder written by `prepare`. Subsets that it names are also scored.
        tokenizer: Tokenizer of captions and references.
        language: Language of the captions, by its code in spaCy.
        meteor: Whether to compute METEOR, which is for English and needs Java.
        spice: Whether to compute SPICE, which is for English and needs Java 8 to 14 and Stanford CoreNLP.
        bootstrap_samples: Number of bootstrap samples for the 95% intervals.
        seed: Bootstrap seed.

    Returns:
        JSON values; `score_lines` formats them.

    Raises:
        UserError: A file is malformed, an image has no reference, or the tokenizer or the language is
            unavailable.
    """
    hypotheses, references = Path(hypotheses), Path(references)
    annotations = read_references(references)
    captions = select_scored(read_results(hypotheses, annotations), annotations, hypotheses, references)
    (corpus,) = build_corpora(tokenizer, language, annotations.captions, [captions])
    return {
        "hypotheses": str(hypotheses),
        "references": str(references),
        "num_images_with_references": sum(map(bool, annotations.captions.values())),
        "num_references_left_out": annotations.num_left_out,
        **summarize_scores(
            compute_metrics(corpus, with_meteor=meteor, with_spice=spice),
            group_subsets({image_id: annotations.subsets.get(image_id) for image_id in captions}),
            Resampling(bootstrap_samples=bootstrap_samples, seed=seed),
        ),
    }


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """Format the result of `score` as a table."""
    left_out = scores["num_references_left_out"]
    lines = [
        f"hypotheses: {scores['hypotheses']}, {scores['num_images']} images",
        f"references: {scores['references']}, {scores['num_images_with_references']} images"
        + (f"; {left_out} precanned or rejected captions are left out" if left_out else ""),
        *_common_protocol(scores["protocol"]),
        "",
        f"{'':<8} {'score':>8}   95% interval",
    ]
    lines += _metric_lines(scores, scores["intervals"])
    lines += _unavailable_lines(scores)
    for name, subset in scores.get("subsets", {}).items():
        lines += [
            "",
            f"{name}, {subset['num_images']} images",
            *_metric_lines(subset, scores["intervals"]["subsets"][name]),
        ]
    return [*lines, *_signature_lines(scores)]


def _metric_lines(scores: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> list[str]:
    """Format the scores of all images or of a subset, one line per metric."""
    lines = []
    for metric in [metric for metric in CORPUS_SCORES if metric in scores]:
        interval = " to ".join(f"{end:.4f}" for end in intervals.get(metric, ())) or "none"
        lines.append(f"{metric:<8} {scores[metric]:>8.4f}   {interval}")
    return lines


def compare(
    a: Path | str,
    b: Path | str,
    references: Path | str,
    *,
    tokenizer: TokenizerName = "spacy",
    language: str = ENGLISH,
    meteor: bool = True,
    spice: bool = False,
    bootstrap_samples: int = 1000,
    seed: int = 1,
) -> dict[str, Any]:
    """Score two results files on the images that both caption, and the paired differences of their scores.

    Args:
        a: COCO results file, output of `gridcap predict --json`, or a folder written by `generate`.
        b: Results to compare with `a`.
        references: COCO annotations file, or a folder written by `prepare`.
        tokenizer: Tokenizer of captions and references.
        language: Language of the captions, by its code in spaCy.
        meteor: Whether to compute METEOR, which is for English and needs Java.
        spice: Whether to compute SPICE, which is for English and needs Java 8 to 14 and Stanford CoreNLP.
        bootstrap_samples: Number of bootstrap samples for the 95% intervals.
        seed: Bootstrap seed.

    Returns:
        JSON values; `compare_lines` formats them. A difference is `significant` if its 95% interval excludes 0;
        for one image there is no interval.

    Raises:
        UserError: A file is malformed, an image has no reference, no image is in both files, or the tokenizer or
            the language is unavailable.
    """
    a, b, references = Path(a), Path(b), Path(references)
    annotations = read_references(references)
    captions_a, captions_b = (
        select_scored(read_results(path, annotations), annotations, path, references) for path in (a, b)
    )
    common = captions_a.keys() & captions_b.keys()
    if not common:
        raise UserError(f"{a}: no image in common with {b}. Compare captions of the same images.")
    corpus_a, corpus_b = build_corpora(
        tokenizer,
        language,
        annotations.captions,
        [{image_id: captions[image_id] for image_id in common} for captions in (captions_a, captions_b)],
    )
    metrics_a = compute_metrics(corpus_a, with_meteor=meteor, with_spice=spice)
    metrics_b = compute_metrics(corpus_b, with_meteor=meteor, with_spice=spice)
    resampling = Resampling(bootstrap_samples=bootstrap_samples, seed=seed)
    return {
        "a": str(a),
        "b": str(b),
        "references": str(references),
        "num_images": len(common),
        "num_unpaired_images": len(captions_a.keys() ^ captions_b.keys()),
        "scores": paired_differences(metrics_a, metrics_b, resampling),
        **provenance(metrics_a, resampling),
    }


def compare_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Format the result of `compare` as a table."""
    unpaired = comparison["num_unpaired_images"]
    lines = [
        f"A: {comparison['a']}",
        f"B: {comparison['b']}",
        f"references: {comparison['references']}, {comparison['num_images']} images in both files"
        + (f"; {unpaired} images in only one file are left out" if unpaired else ""),
        *_common_protocol(comparison["protocol"]),
        "",
        f"{'':<8} {'A':>8} {'B':>8} {'B - A':>9}   95% interval",
    ]
    for metric, scores in comparison["scores"].items():
        interval = " to ".join(f"{end:+.4f}" for end in scores["interval"] or ()) or "none"
        lines.append(
            f"{metric:<8} {scores['a']:>8.4f} {scores['b']:>8.4f} {scores['difference']:>+9.4f}   "
            f"{interval}  {_verdict(scores)}"
        )
    return [*lines, *_unavailable_lines(comparison), *_signature_lines(comparison)]


def _verdict(scores: Mapping[str, Any]) -> str:
    if scores["interval"] is None:
        return "not testable"
    if not scores["significant"]:
        return "not significant"
    return "B is better" if scores["difference"] > 0 else "A is better"


def _common_protocol(protocol: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the protocol lines that all scores share: tokenizer, number of references, and intervals."""
    shared = [line for line in protocol["BLEU-1"] if line.startswith(("tokenizer: ", "references per image: "))]
    return [*shared, *protocol["intervals"]]


def _unavailable_lines(scores: Mapping[str, Any]) -> list[str]:
    return [f"{metric:<8} {reason}" for metric, (reason,) in scores["unavailable"].items()]


def _signature_lines(scores: Mapping[str, Any]) -> list[str]:
    return ["", "signatures:", *(f"  {signature}" for (signature,) in scores["signature"].values())]
