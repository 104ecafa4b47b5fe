"""Parser of Flickr caption files: Kaggle's CSV of Flickr8k (`captions.txt`), Kaggle's table of Flickr30k
(`results.csv`, with columns separated by bars), and the original token files (`Flickr8k.token.txt`).

The CSV format also works for any other folder of captioned images. Its columns may have any order, and others are
ignored.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.captions.sources.parsed_file import (
    ParsedFile,
    ParsedImage,
    SourceCaption,
    id_from_name,
    join_relative,
    read_text,
)
from pipeline.errors import UserError, summarize

_NAME_COLUMN, _CAPTION_COLUMN = "image", "caption"
_BAR_HEADER = ["image_name", "comment_number", "comment"]
_BAR_LINE = re.compile(r"(?P<name>[^|]+)\|\s*\d+\s*\|(?P<caption>.*)")
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")
_NAME_ONLY_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\s*")
_TOKEN_FORMAT = "'NAME#0', a tab and the caption"
_MAX_HEADER = 10_000  # characters of the first line that are read as a header; the csv module refuses long fields
_MAX_SHOWN = 80  # characters of a malformed line in an error message


class Row(NamedTuple):
    """A row of a caption file."""

    line: int
    name: str
    caption: str | None
    """None if the row is malformed."""


def parse(path: Path, folder: str) -> ParsedFile:
    """Parse a Flickr8k or Flickr30k caption file.

    The first line determines the format: CSV starts with a header that has the columns `image` and `caption`, in any
    case; Flickr30k's table starts with `image_name| comment_number| comment`; every line of the token file is
    `NAME#INDEX`, a tab and a caption. A row with only a name is an empty caption.

    Args:
        path: The caption file.
        folder: Folder of its images, relative to the image folder.

    Raises:
        UserError: The file is missing, or a line has neither format.
    """
    text = read_text(path)
    rows = parse_rows(path, text)
    if rows is None:
        first_line = text.partition("\n")[0].strip()
        raise UserError(
            f"{path}:1: expected the header 'image,caption' or '{'| '.join(_BAR_HEADER)}', or {_TOKEN_FORMAT}, got "
            f"{first_line[:_MAX_SHOWN]!r}. Add the header, or change dataset.format."
        )
    rows_by_name: dict[str, list[Row]] = {}
    for row in rows:
        rows_by_name.setdefault(row.name, []).append(row)
    unnamed = rows_by_name.pop("", [])
    return ParsedFile(
        images=[_make_image(path, folder, name, image_rows) for name, image_rows in rows_by_name.items()],
        unmatched_captions=[f"{path}:{row.line} (no image name)" for row in unnamed],
        malformed_rows=[
            f"{path}:{row.line} ({row.name})"
            for image_rows in rows_by_name.values()
            for row in image_rows
            if row.caption is None
        ],
    )


def parse_rows(path: Path, text: str, needs_names: bool = True) -> Iterator[Row] | None:
    """Parse the rows of a file in one of the formats of `parse`.

    Args:
        path: The caption file, for error messages.
        text: Its content.
        needs_names: Whether CSV must name the images. Otherwise it may have the column `caption` alone, and its rows
            have an empty name.

    Returns:
        The rows; None if the first line has none of the formats.

    Raises:
        UserError: A line after the first does not have its format.
    """
    first_line = text.partition("\n")[0].strip()
    if _TOKEN_LINE.fullmatch(first_line):
        return _parse_token_lines(path, text)
    if [column.strip() for column in first_line.split("|")] == _BAR_HEADER:
        return _parse_bar_lines(text)
    header = [
        column.strip().lower() for column in next(csv.reader([first_line[:_MAX_HEADER]], skipinitialspace=True), [])
    ]
    has_names = header.count(_NAME_COLUMN) == header.count(_CAPTION_COLUMN) == 1
    if has_names or (header == [_CAPTION_COLUMN] and not needs_names):
        return _parse_csv(path, text, header)
    return None


def _make_image(path: Path, folder: str, name: str, rows: list[Row]) -> ParsedImage:
    file = join_relative(folder, name)
    return ParsedImage(
        image_id=id_from_name(file),
        has_name_id=True,
        file=file,
        location=f"{path}:{rows[0].line}",
        split=None,
        captions=tuple(SourceCaption(row.caption, f"{path}:{row.line}") for row in rows if row.caption is not None),
    )


def _parse_csv(path: Path, content: str, header: Sequence[str]) -> Iterator[Row]:
    name = header.index(_NAME_COLUMN) if _NAME_COLUMN in header else None
    caption = header.index(_CAPTION_COLUMN)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True, skipinitialspace=True)
    faults = []
    line = 1
    try:
        next(reader)
        # A quoted caption may contain line breaks, so a row starts on the line after the end of the previous row.
        line = reader.line_num + 1
        for columns in reader:
            if len(columns) > len(header):
                faults.append(f"{path}:{line}: expected {len(header)} columns, got {len(columns)}")
            elif any(column.strip() for column in columns):
                row_name = columns[name].strip() if name is not None and name < len(columns) else ""
                has_only_name = len(columns) == 1 and name == 0
                text = columns[caption] if len(columns) == len(header) else "" if has_only_name else None
                yield Row(line, row_name, text)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV ({error}). Fix the quotes.") from error
    if faults:
        raise UserError(f"{summarize(faults)}. Quote captions that contain a comma.")


def _parse_bar_lines(text: str) -> Iterator[Row]:
    for line_number, line in enumerate(text.split("\n")[1:], start=2):
        if match := _BAR_LINE.fullmatch(line.removesuffix("\r")):
            yield Row(line_number, match["name"].strip(), match["caption"])
        elif line.strip():
            name, _, remainder = line.partition("|")
            yield Row(line_number, name.strip(), None if remainder.strip(" |\r") else "")


def _parse_token_lines(path: Path, text: str) -> Iterator[Row]:
    faults = []
    for line_number, line in enumerate(text.split("\n"), start=1):
        if match := _TOKEN_LINE.fullmatch(line.removesuffix("\r")):
            yield Row(line_number, match["name"].strip(), match["caption"])
        elif match := _NAME_ONLY_LINE.fullmatch(line):
            yield Row(line_number, match["name"].strip(), "")
        elif line.strip():
            faults.append(f"{path}:{line_number}: expected {_TOKEN_FORMAT}, got {line[:_MAX_SHOWN]!r}")
    if faults:
        raise UserError(f"{summarize(faults)}. Fix these lines.")
