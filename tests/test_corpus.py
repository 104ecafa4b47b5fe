from importlib.metadata import version

import pytest

from pipeline.metrics.bleu import bleu_counts
from pipeline.metrics.cider import cider
from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Corpus
from pipeline.metrics.meteor import meteor_counts
from pipeline.metrics.rouge import rouge_l
from pipeline.metrics.spice import spice
from pipeline.metrics.tokenizers import SPACY


def corpus(*num_references: int) -> Corpus:
    """Build a corpus whose images have these numbers of references."""
    return Corpus(
        image_ids=tuple(range(len(num_references))),
        hypotheses=(["a"],) * len(num_references),
        references=tuple([["a"]] * count for count in num_references),
        tokenization=SPACY,
    )


@pytest.mark.parametrize(
    ("num_references", "line", "field"),
    [((5, 5), "references per image: 5", "5"), ((3, 1, 5), "references per image: 1 to 5", "1-5")],
)
def test_protocol_and_signature_give_the_number_of_references(num_references, line, field):
    assert line in corpus(*num_references).protocol
    assert corpus(*num_references).signature["refs"] == field


def test_protocol_and_signature_give_the_tokenization():
    assert f"tokenizer: {SPACY.description}" in corpus(1).protocol
    assert SPACY.signature.items() <= corpus(1).signature.items()


def test_library_has_the_version_of_the_package():
    assert f"gridcap {version('gridcap')}" == LIBRARY
    assert f"gridcap-{version('gridcap')}" == LIBRARY_TAG


@pytest.mark.parametrize("metric", [bleu_counts, cider, rouge_l, meteor_counts, spice])
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([["a"], ["b"]], [[["a"]], []], "index 1 has no reference"),
        ([["a"]], [[["a"]], [["b"]]], "1 hypotheses but references for 2 images"),
        ([], [], "no images"),
    ],
)
def test_metrics_reject_an_invalid_corpus(metric, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)
