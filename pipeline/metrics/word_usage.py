"""Words and phrases that captions use more often or more rarely than references.

Scores do not show which words are wrong: captions that all end in "on a bench" share many n-grams with references.
Usage is counted in images, so that each number says how many captions are affected.

Legend: `N` images.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

from pipeline.captions.vocabulary import END, SPECIALS, START
from pipeline.metrics.corpus import LIBRARY, Words, ngrams
from pipeline.metrics.diversity import FUNCTION_WORDS

MIN_RATIO = 2
"""Minimum ratio of the two counts of an overused or underused word."""
MIN_DIFFERENCE = 5
"""Minimum difference of the two counts, in images."""
MAX_ORDER = 4
"""Maximum length of a phrase in words, `<start>` and `<end>` included."""
NUMBER_WORDS = frozenset({"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"})
"""Words that count objects."""

PROTOCOL = (
    f"library: {LIBRARY}",
    "tokenizer: that of stage tokenize, also when scores use another",
    "content word: any word but <unk>, punctuation and FUNCTION_WORDS; inflected forms are different words",
    "said: images whose caption has the word; right: of these, images with the word in any reference",
    "in_references: fraction of an image's references that have the word, summed over images",
    f"overused: said is at least {MIN_RATIO} times in_references and {MIN_DIFFERENCE} images more; of words, less than"
    " half of said is right",
    f"underused: in_references is at least {MIN_RATIO} times said and {MIN_DIFFERENCE} images more",
    f"phrase: 2 to {MAX_ORDER} words with a content word, <start> and <end> included",
    "phrases left out: those that share two neighboring words with one of larger (said - in_references) x length",
    "precision: fraction of the content words of captions that are right",
    "recall: fraction of the content words of a reference that the caption has",
    "number_precision: fraction of the number words of captions that are right",
    "repeated_word_rate: fraction of captions that have a content word twice",
    "reference: one reference of each image (of the first image the first, of the second the second, and so on) against"
    " the image's other references",
)

Phrase = tuple[str, ...]
"""Consecutive words of a caption; one content word in tables of words."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How often captions and references use a phrase."""

    phrase: Phrase
    said: int
    """Number of images whose caption has the phrase."""
    right: int
    """Number of these images with the phrase in any reference."""
    in_references: float
    """Fraction of an image's references that have the phrase, summed over images."""
    image_id: int
    """Image that shows the difference.

    If captions have the phrase more often, one with the phrase in its caption, if possible wrongly; otherwise the image
    with the phrase in most of its references, but not in its caption.
    """

    @property
    def excess(self) -> float:
        """Number of images in which captions have the phrase more often than references; negative if more rarely."""
        return self.said - self.in_references

    @property
    def is_frequent(self) -> bool:
        """Whether captions have the phrase far more often than references."""
        return self.said >= MIN_RATIO * self.in_references and self.excess >= MIN_DIFFERENCE

    @property
    def is_overused(self) -> bool:
        """Whether captions have the phrase far more often than references, and mostly wrongly."""
        return self.is_frequent and 2 * self.right < self.said

    @property
    def is_underused(self) -> bool:
        """Whether captions have the phrase far more rarely than references."""
        return self.in_references >= MIN_RATIO * self.said and -self.excess >= MIN_DIFFERENCE


@dataclass(frozen=True, kw_only=True)
class WordUsage:
    """Usage of words and phrases in the captions of N images."""

    metrics: dict[str, int | float | None]
    """Metrics by name, as JSON values; a fraction of nothing is None."""
    overused_words: list[Usage]
    """Content words, by descending excess."""
    underused_words: list[Usage]
    """Content words, by ascending excess."""
    overused_phrases: list[Usage]
    """Phrases of two or more words, by descending excess."""
    number_words: list[Usage]
    """All number words that occur, by descending use in references."""
    repeated_words: list[Usage]
    """Content words that a caption has twice, by descending number of these captions, which is `said`."""


def word_usage(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> WordUsage:
    """Compare the words and phrases of captions with those of references.

    Args:
        captions: A tokenized caption of each of N images, by image id.
        references: At least one tokenized reference of each of these images.
    """
    words = _count(captions, references, _content_words)
    number_words = [usage for usage in words if usage.phrase[0].lower() in NUMBER_WORDS]
    repeated_words = [usage for usage in _count(captions, references, _repeated_words) if usage.said]
    overused_words = [usage for usage in words if usage.is_overused]
    underused_words = [usage for usage in words if usage.is_underused]
    overused_phrases = _without_overlaps(_frequent_phrases(captions, references))
    num_repeating = sum(bool(_repeated_words(caption)) for caption in captions.values())
    return WordUsage(
        metrics={
            "precision": _precision(words),
            "recall": _recall(captions, references),
            "number_precision": _precision(number_words),
            "repeated_word_rate": _rate(num_repeating, len(captions)),
            "num_overused_words": len(overused_words),
            "num_underused_words": len(underused_words),
            "num_overused_phrases": len(overused_phrases),
        },
        overused_words=sorted(overused_words, key=lambda usage: (-usage.excess, usage.phrase)),
        underused_words=sorted(underused_words, key=lambda usage: (usage.excess, usage.phrase)),
        overused_phrases=sorted(overused_phrases, key=lambda usage: (-usage.excess, usage.phrase)),
        number_words=sorted(number_words, key=lambda usage: (-usage.in_references, usage.phrase)),
        repeated_words=sorted(repeated_words, key=lambda usage: (-usage.said, usage.phrase)),
    )


def human_word_usage(references: Mapping[int, Sequence[Words]]) -> WordUsage:
    """Compare one reference of each image with its other references, as `leave_one_out` chooses them.

    Args:
        references: The tokenized references of each image, by image id.
    """
    return word_usage(*leave_one_out(references))


def leave_one_out(
    references: Mapping[int, Sequence[Words]],
) -> tuple[dict[int, Words], dict[int, list[Words]]]:
    """Return one reference of each image, and its other references; images with a single reference are left out.

    References may be sorted, as in Flickr8k, so the first reference is taken from one image, the second from the next,
    and so on.
    """
    several = {image_id: captions for image_id, captions in references.items() if len(captions) > 1}
    chosen = {image_id: row % len(captions) for row, (image_id, captions) in enumerate(several.items())}
    return (
        {image_id: several[image_id][index] for image_id, index in chosen.items()},
        {image_id: [*several[image_id][:index], *several[image_id][index + 1 :]] for image_id, index in chosen.items()},
    )


def is_content_word(word: str) -> bool:
    """Return whether a word is none of `FUNCTION_WORDS`, punctuation and special tokens such as `<unk>`."""
    return word not in SPECIALS and word.lower() not in FUNCTION_WORDS and any(map(str.isalnum, word))


def _content_words(words: Words) -> set[Phrase]:
    return {(word,) for word in words if is_content_word(word)}


def _repeated_words(words: Words) -> set[Phrase]:
    return {(word,) for word, count in Counter(words).items() if count > 1 and is_content_word(word)}


def _phrases(words: Words) -> set[Phrase]:
    padded = [SPECIALS[START], *words, SPECIALS[END]]
    return {phrase for phrase in ngrams(padded, MAX_ORDER) if len(phrase) > 1}


def _frequent_phrases(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> list[Usage]:
    """Return the phrases with a content word that captions have far more often than references."""
    counts = Counter(phrase for words in captions.values() for phrase in _phrases(words))
    # Rarer phrases cannot be frequent; without them, counting is six times as fast.
    candidates = {
        phrase for phrase, count in counts.items() if count >= MIN_DIFFERENCE and any(map(is_content_word, phrase))
    }
    usages = _count(captions, references, lambda words: candidates & _phrases(words))
    return [usage for usage in usages if usage.is_frequent]


def _count(
    captions: Mapping[int, Words],
    references: Mapping[int, Sequence[Words]],
    find_phrases: Callable[[Words], AbstractSet[Phrase]],
) -> list[Usage]:
    """Count the phrases of captions and references, each once per caption."""
    said, right = Counter[Phrase](), Counter[Phrase]()
    in_references: defaultdict[Phrase, float] = defaultdict(float)
    # Images to show: the lowest of whether the phrase is right and the id, and of the negative fraction and the id.
    said_image: dict[Phrase, tuple[bool, int]] = {}
    missed_image: dict[Phrase, tuple[float, int]] = {}
    for image_id, words in captions.items():
        in_caption = find_phrases(words)
        counts = Counter(phrase for reference in references[image_id] for phrase in find_phrases(reference))
        for phrase in in_caption:
            is_right = phrase in counts
            said[phrase] += 1
            right[phrase] += is_right
            said_image[phrase] = min((is_right, image_id), said_image.get(phrase, (True, image_id)))
        for phrase, count in counts.items():
            fraction = count / len(references[image_id])
            in_references[phrase] += fraction
            if phrase not in in_caption:
                missed_image[phrase] = min((-fraction, image_id), missed_image.get(phrase, (0.0, image_id)))
    return [
        Usage(
            phrase=phrase,
            said=said[phrase],
            right=right[phrase],
            in_references=round(in_references[phrase], 3),
            image_id=(said_image if said[phrase] >= round(in_references[phrase], 3) else missed_image)[phrase][1],
        )
        for phrase in said.keys() | in_references.keys()
    ]


def _without_overlaps(usages: Sequence[Usage]) -> list[Usage]:
    """Leave out phrases that share a pair of neighboring words, one of them a content word, with a chosen phrase.

    Phrases are chosen by descending excess times length.
    """
    chosen, chosen_pairs = [], set[Phrase]()
    for usage in sorted(usages, key=lambda usage: (-usage.excess * len(usage.phrase), usage.phrase)):
        pairs = {pair for pair in pairwise(usage.phrase) if any(map(is_content_word, pair))}
        if chosen_pairs.isdisjoint(pairs):
            chosen.append(usage)
            chosen_pairs |= pairs
    return chosen


def _precision(usages: Sequence[Usage]) -> float | None:
    return _rate(sum(usage.right for usage in usages), sum(usage.said for usage in usages))


def _recall(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> float | None:
    num_found = num_words = 0
    for image_id, words in captions.items():
        in_caption = _content_words(words)
        for reference in references[image_id]:
            in_reference = _content_words(reference)
            num_found += len(in_caption & in_reference)
            num_words += len(in_reference)
    return _rate(num_found, num_words)


def _rate(count: int, total: int) -> float | None:
    return round(count / total, 6) if total else None
