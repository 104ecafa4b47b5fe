"""What a dataset is like: `gridcap stats` and section Dataset of the report."""

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

from pipeline.captions.leaks import count_caption_images, find_leaked_images, shared_captions
from pipeline.captions.records import SPLITS, Record, Split, read_records
from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, read_tokens, require_vocabulary
from pipeline.captions.vocabulary import SPECIALS, VOCABULARY_FILE, read_vocabulary
from pipeline.features.images import upright_size
from pipeline.features.near_duplicates import NEAR_DUPLICATES_FILE, read_near_duplicates
from pipeline.features.store import INDEX_FILE, FeatureStore

logger = logging.getLogger("gridcap")

MIN_COUNTS = (1, 2, 3, 5, 10, 20)
"""Values of `tokenize.min_count` for which the vocabulary is described."""
MAX_SIZED_IMAGES = 500
"""Number of images whose files are opened for their sizes, evenly spaced among all."""
MISSING = "-"
"""What is shown for a statistic of an artifact that does not exist, or of nothing."""
MAX_LISTED = 10
"""Number of leaks and shared captions that are listed."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Range of some values."""

    min: int
    mean: float
    max: int


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """Statistics of a split. Ranges and rates of nothing are None, as are statistics without their artifact."""

    num_images: int
    num_captions: int
    references_per_image: Range | None
    words_per_caption: Range | None
    """From tokens."""
    unk_rate: float | None
    """Fraction of the words that are not in the vocabulary; from tokens."""
    num_leaked_images: int | None
    """Number of images whose file has the same bytes as an image of another split; from the image folder."""
    num_near_duplicates: int | None
    """Number of images that nearly equal an image of another split; from features, and for val and test only."""


@dataclass(frozen=True, kw_only=True)
class VocabularyStats:
    """The vocabulary that a value of `tokenize.min_count` gives."""

    min_count: int
    num_words: int
    """Number of words, without the special tokens."""
    coverage: dict[Split, float | None]
    """Fraction of the words of each split that are in the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """Statistics of a dataset."""

    splits: dict[Split, SplitStats]
    vocab_size: int | None
    """Size of the vocabulary, with the special tokens; None without tokens."""
    vocabularies: list[VocabularyStats]
    """Empty without tokens."""
    num_sized_images: int
    """Number of images whose width and height, in px, were read."""
    width: Range | None
    height: Range | None
    max_images_per_caption: int
    """Most images that share one caption."""
    num_shared_captions: int
    """Number of distinct captions that many images share: at least 5 and 1% of all images."""
    shared_captions: list[tuple[str, int]]
    """The first of these, in lowercase, with their numbers of images."""
    leaked_images: list[list[str]]
    """The first groups of files with the same bytes, each with its split."""
    near_duplicates: list[list[str]]
    """The first pairs of nearly equal images, each with its split."""


def compute_stats(
    prepared: Path, image_dir: Path, tokens: Path, features: Path, store: FeatureStore | None = None
) -> DatasetStats:
    """Compute the statistics of the artifacts that exist. Artifacts of other images than the records' are left out.

    Args:
        prepared: Folder of records, from `prepare`.
        image_dir: Image folder of the dataset.
        tokens: Folder of tokens, from `tokenize`.
        features: Feature store, from `encode`.
        store: The store in `features`, if it has been opened.

    Raises:
        UserError: An artifact is damaged, or there are no records.
    """
    records = read_records(prepared)
    by_id = {record.image_id: record for record in records}
    store = _read_store(features, by_id.keys(), store)
    # The store knows equal files, so that no image is read: COCO has 19 GB.
    leaks = find_leaked_images(image_dir, records, None if store is None else _file_keys(store, records))
    leaked_ids = {record.image_id for group in leaks for record in group} if store or image_dir.is_dir() else None
    pairs = None if store is None else read_near_duplicates(features)
    duplicate_ids = None if pairs is None else {pair.image_id for pair in pairs}
    split_tokens = _read_tokens(tokens, records)
    counts = {split: _count_words(captions) for split, captions in split_tokens.items()}
    vocabulary = read_vocabulary(tokens / VOCABULARY_FILE) if split_tokens else None
    known_words = frozenset(vocabulary.words[len(SPECIALS) :]) if vocabulary else frozenset()
    num_images = count_caption_images(records)
    shared = shared_captions(num_images, len(records))
    sizes = list(_image_sizes(image_dir, records))

    def split_stats(split: Split) -> SplitStats:
        split_records = [record for record in records if record.split == split]
        known = _coverage(counts[split], known_words) if counts else None
        return SplitStats(
            num_images=len(split_records),
            num_captions=sum(len(record.captions) for record in split_records),
            references_per_image=_range([len(record.captions) for record in split_records]),
            words_per_caption=_range([line.count(" ") + 1 for line in split_tokens[split].captions])
            if counts
            else None,
            unk_rate=None if known is None else round(1 - known, 6),
            num_leaked_images=_count(split_records, leaked_ids),
            num_near_duplicates=None if split == "train" else _count(split_records, duplicate_ids),
        )

    return DatasetStats(
        splits={split: split_stats(split) for split in SPLITS},
        vocab_size=len(vocabulary) if vocabulary else None,
        vocabularies=[_vocabulary_stats(counts, min_count) for min_count in MIN_COUNTS] if counts else [],
        num_sized_images=len(sizes),
        width=_range([width for width, _ in sizes]),
        height=_range([height for _, height in sizes]),
        max_images_per_caption=max(num_images.values(), default=0),
        num_shared_captions=len(shared),
        shared_captions=shared[:MAX_LISTED],
        leaked_images=[[_describe(record) for record in group] for group in leaks[:MAX_LISTED]],
        near_duplicates=[
            [_describe(by_id[pair.image_id]), _describe(by_id[pair.other_id])] for pair in (pairs or ())[:MAX_LISTED]
        ],
    )


def _read_store(folder: Path, image_ids: Collection[int], store: FeatureStore | None) -> FeatureStore | None:
    """Return the feature store of these images in a folder; None if there is none with near-duplicates."""
    if not ((folder / INDEX_FILE).is_file() and (folder / NEAR_DUPLICATES_FILE).is_file()):
        return None
    store = store or FeatureStore(folder)
    return store if _belongs(folder, "encode", {*store.image_ids, *store.skipped_ids} == set(image_ids)) else None


def _file_keys(store: FeatureStore, records: Sequence[Record]) -> dict[str, Hashable]:
    """Return a value for each file that only equal files share; those that `encode` skipped share none."""
    return {
        record.file: record.file if record.image_id in store.skipped_ids else store.first_row(record.image_id)
        for record in records
    }


def _read_tokens(folder: Path, records: Sequence[Record]) -> dict[Split, CaptionTokens]:
    """Read the tokens of all splits; none if the folder has no tokens of these records."""
    path = folder / TOKENS_FILE
    if not path.is_file():
        return {}
    require_vocabulary(path, read_vocabulary(folder / VOCABULARY_FILE))
    tokens = {split: read_tokens(path, split) for split in SPLITS}
    image_ids = {split: {record.image_id for record in records if record.split == split} for split in SPLITS}
    same = all(set(tokens[split].image_id.tolist()) == image_ids[split] for split in SPLITS)
    return tokens if _belongs(folder, "tokenize", same) else {}


def _belongs(folder: Path, stage: str, same: bool) -> bool:
    if not same:
        logger.warning("%s: has other images than the records, and is left out. Run `dvc repro %s`.", folder, stage)
    return same


def _count_words(captions: CaptionTokens) -> Counter[str]:
    """Count words one caption after another: a list of all words of COCO's train split takes 300 MB."""
    return Counter(chain.from_iterable(map(str.split, captions.captions)))


def _vocabulary_stats(counts: dict[Split, Counter[str]], min_count: int) -> VocabularyStats:
    words = {word for word, count in counts["train"].items() if count >= min_count} - {*SPECIALS}
    return VocabularyStats(
        min_count=min_count,
        num_words=len(words),
        coverage={split: _coverage(split_counts, words) for split, split_counts in counts.items()},
    )


def _coverage(counts: Counter[str], words: Collection[str]) -> float | None:
    """Return the fraction of counted words that are among `words`."""
    if not counts:
        return None
    return round(sum(count for word, count in counts.items() if word in words) / counts.total(), 6)


def _count(records: Sequence[Record], image_ids: Collection[int] | None) -> int | None:
    """Count the records of some images; None if these are not known."""
    return None if image_ids is None else sum(record.image_id in image_ids for record in records)


def _range(values: Sequence[int]) -> Range | None:
    return Range(min=min(values), mean=round(fmean(values), 3), max=max(values)) if values else None


def _image_sizes(image_dir: Path, records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Yield width and height, in px, of the images that can be opened."""
    for record in records[:: -(-len(records) // MAX_SIZED_IMAGES) or 1]:
        try:
            yield upright_size(image_dir / record.file)
        except Exception:  # Pillow raises errors of every kind for broken files, which `encode` reports
            continue


def _describe(record: Record) -> str:
    return f"{record.file} ({record.split})"


def stats_lines(stats: DatasetStats) -> list[str]:
    """Format statistics as text."""
    lines = [f"{'':<34}" + "".join(f"{split:>18}" for split in SPLITS)]
    for title, values in split_rows(stats):
        lines.append(f"{title:<34}" + "".join(f"{value:>18}" for value in values))
    if stats.vocabularies:
        lines += ["", f"{'tokenize.min_count':<18}{'words':>16}" + "".join(f"{f'known, {s}':>18}" for s in SPLITS)]
        for vocabulary in stats.vocabularies:
            coverage = "".join(f"{_percent(vocabulary.coverage[split]):>18}" for split in SPLITS)
            lines.append(f"{vocabulary.min_count:<18}{vocabulary.num_words:>16,}{coverage}")
    lines.append("")
    lines += [f"{title}: {text}" for title, text in summary_rows(stats)]
    for title, items in listed_leaks(stats):
        lines += ["", f"{title}:", *(f"  {item}" for item in items)]
    return lines


def split_rows(stats: DatasetStats) -> list[tuple[str, list[str]]]:
    """Return the title of each statistic of splits, and its value for each split."""
    splits = [stats.splits[split] for split in SPLITS]
    return [
        ("images", [f"{split.num_images:,}" for split in splits]),
        ("captions", [f"{split.num_captions:,}" for split in splits]),
        ("references per image", [_format_range(split.references_per_image) for split in splits]),
        ("words per caption", [_format_range(split.words_per_caption) for split in splits]),
        ("unknown words", [_percent(split.unk_rate) for split in splits]),
        ("images also in another split", [_format_count(split.num_leaked_images) for split in splits]),
        ("near-duplicates in another split", [_format_count(split.num_near_duplicates) for split in splits]),
    ]


def summary_rows(stats: DatasetStats) -> list[tuple[str, str]]:
    """Return the title and the text of each statistic of the whole dataset."""
    vocab_size = MISSING if stats.vocab_size is None else f"{stats.vocab_size:,}, with {len(SPECIALS)} special tokens"
    return [
        ("vocabulary", vocab_size),
        ("image width, px", f"{_format_range(stats.width)}, of {stats.num_sized_images:,} images"),
        ("image height, px", f"{_format_range(stats.height)}, of {stats.num_sized_images:,} images"),
        ("most images with the same caption", f"{stats.max_images_per_caption:,}"),
        ("captions that many images share", f"{stats.num_shared_captions:,}"),
    ]


def listed_leaks(stats: DatasetStats) -> list[tuple[str, list[str]]]:
    """Return lists of leaks and shared captions with their titles, without empty lists."""
    shared = [f"{caption} ({count:,} images)" for caption, count in stats.shared_captions]
    lists = [
        (f"Same file in several splits, at most {MAX_LISTED}", [" = ".join(group) for group in stats.leaked_images]),
        (f"Near-duplicates, at most {MAX_LISTED}", [" and ".join(pair) for pair in stats.near_duplicates]),
        (f"Captions that many images share, at most {MAX_LISTED}", shared),
    ]
    return [(title, items) for title, items in lists if items]


def _format_count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def _format_range(values: Range | None) -> str:
    return MISSING if values is None else f"{values.mean:,.1f} ({values.min:,} to {values.max:,})"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2%}"
