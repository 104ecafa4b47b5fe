"""Scores of caption files from anywhere, alone (`gridcap score`) and beside others (`gridcap compare`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.coco_files import check_known, read_references, read_results
from pipeline.metrics.bootstrap import Resampling, paired_difference
from pipeline.metrics.caption_scores import CORPUS_SCORES, MetricTables, measure, statements, summary
from pipeline.metrics.tokenizers import TokenizerName, corpora


def score(
    hypotheses: Path,
    references: Path,
    tokenizer: TokenizerName,
    with_meteor: bool,
    with_spice: bool,
    resampling: Resampling,
) -> dict[str, Any]:
    """Score the images that a results file captions, as plain values to write down or to give `score_lines`.

    Raises `UserError` where a file is faulty, an image has no reference, or the protocol cannot be followed.
    """
    captions, wanted = read_results(hypotheses), read_references(references)
    check_known(captions, wanted, hypotheses, references)
    (corpus,) = corpora(tokenizer, wanted, [captions])
    measured = measure(corpus, with_meteor, with_spice)
    return {
        "hypotheses": str(hypotheses),
        "references": str(references),
        "images_with_references": sum(map(bool, wanted.values())),
        **summary(measured, {}, resampling),
    }


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """What `score` found, as a table to read."""
    lines = [
        f"{scores['hypotheses']} against {scores['references']}: "
        f"{scores['images']} images scored of {scores['images_with_references']}",
        *_shared(scores["protocol"]),
        "",
        f"{'':<8} {'score':>8}   95% interval",
    ]
    for name in [name for name in CORPUS_SCORES if name in scores]:
        low, high = scores["intervals"][name]
        lines.append(f"{name:<8} {scores[name]:>8.4f}   {low:.4f} to {high:.4f}")
    return [*lines, *(f"{name:<8} {reason}" for name, (reason,) in scores["unavailable"].items())]


def compare(
    first: Path,
    second: Path,
    references: Path,
    tokenizer: TokenizerName,
    with_meteor: bool,
    with_spice: bool,
    resampling: Resampling,
) -> dict[str, Any]:
    """Score two results files on the images that both caption, and their differences, as plain values.

    `noise` says of a difference that its interval, of the same resamples of images for both, includes 0. Raises
    `UserError` as `score` does, and where no image is in both files.
    """
    systems = [read_results(path) for path in (first, second)]
    wanted = read_references(references)
    for path, captions in zip((first, second), systems, strict=True):
        check_known(captions, wanted, path, references)
    common = systems[0].keys() & systems[1].keys()
    if not common:
        raise UserError(f"{first} and {second} caption no image that is in both; compare captions of the same images")
    pair = corpora(tokenizer, wanted, [{one: captions[one] for one in common} for captions in systems])
    one, other = (measure(corpus, with_meteor, with_spice) for corpus in pair)
    return {
        "first": str(first),
        "second": str(second),
        "references": str(references),
        "images": len(common),
        "images_of_one_alone": len(systems[0].keys() ^ systems[1].keys()),
        "scores": _differences(one, other, resampling),
        **statements(one, resampling),
    }


def _differences(first: MetricTables, second: MetricTables, resampling: Resampling) -> dict[str, dict[str, Any]]:
    found = {}
    for name in [name for name in first.tables if name in second.tables]:
        difference = paired_difference(second.tables[name], first.tables[name], CORPUS_SCORES[name], resampling)
        found[name] = {
            "first": round(first.score(name), 6),
            "second": round(second.score(name), 6),
            "difference": round(difference.value, 6),
            "interval": [round(difference.low, 6), round(difference.high, 6)],
            "noise": difference.includes_zero,
        }
    return found


def compare_lines(found: Mapping[str, Any]) -> list[str]:
    """What `compare` found, as a table to read."""
    alone = found["images_of_one_alone"]
    lines = [
        f"A  {found['first']}",
        f"B  {found['second']}",
        f"against {found['references']}: {found['images']} images that both caption"
        + (f"; {alone} more are in one file alone and left out" if alone else ""),
        *_shared(found["protocol"]),
        "",
        f"{'':<8} {'A':>8} {'B':>8} {'B - A':>9}   95% interval",
    ]
    for name, one in found["scores"].items():
        low, high = one["interval"]
        lines.append(
            f"{name:<8} {one['first']:>8.4f} {one['second']:>8.4f} {one['difference']:>+9.4f}   "
            f"{low:+.4f} to {high:+.4f}  {_verdict(one)}"
        )
    return [*lines, *(f"{name:<8} {reason}" for name, (reason,) in found["unavailable"].items())]


def _verdict(one: Mapping[str, Any]) -> str:
    if one["noise"]:
        return "noise: the interval includes 0"
    return "B is better" if one["difference"] > 0 else "A is better"


def _shared(protocol: Mapping[str, Sequence[str]]) -> list[str]:
    """What all scores say of themselves: their words and references, and how intervals were made."""
    of_captions = [line for line in protocol["BLEU-1"] if line.startswith(("tokens: ", "references: "))]
    return [*of_captions, *protocol["intervals"]]
