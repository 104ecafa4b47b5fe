"""Parser of Flickr8k caption files: Kaggle's CSV (`captions.txt`) and the original `Flickr8k.token.txt`.

The CSV format also works for any other folder of captioned images.
"""

import csv
import io
import re
from collections.abc import Iterator
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

_HEADER = ["image", "caption"]
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")
_TOKEN_FORMAT = "'NAME#0', a tab and the caption"
_MAX_SHOWN = 80  # characters of a malformed line in an error message


class _Row(NamedTuple):
    line: int
    name: str
    caption: str


def parse(path: Path, folder: str) -> ParsedFile:
    """Parse a Flickr8k caption file.

    The first line determines the format: CSV starts with the header `image,caption`; every line of the token file is
    `NAME#INDEX`, a tab and a caption.

    Args:
        path: The caption file.
        folder: Folder of its images, relative to the image folder.

    Raises:
        UserError: The file is missing, or a line has neither format.
    """
    text = read_text(path)
    first_line = text.partition("\n")[0].strip()
    if [column.strip().strip('"') for column in first_line.split(",")] == _HEADER:
        rows = _parse_csv(path, text)
    elif _TOKEN_LINE.fullmatch(first_line):
        rows = _parse_token_lines(path, text)
    else:
        raise UserError(
            f"{path}:1: expected the header 'image,caption', or {_TOKEN_FORMAT}, got {first_line[:_MAX_SHOWN]!r}."
            " Add the header, or change dataset.format."
        )
    rows_by_name: dict[str, list[_Row]] = {}
    for row in rows:
        rows_by_name.setdefault(row.name, []).append(row)
    images = [_make_image(path, folder, name, image_rows) for name, image_rows in rows_by_name.items()]
    return ParsedFile(images=images, unmatched_captions=[])


def _make_image(path: Path, folder: str, name: str, rows: list[_Row]) -> ParsedImage:
    file = join_relative(folder, name)
    return ParsedImage(
        image_id=id_from_name(file),
        file=file,
        location=f"{path}:{rows[0].line}",
        split=None,
        captions=tuple(SourceCaption(row.caption, f"{path}:{row.line}") for row in rows),
    )


def _parse_csv(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    faults = []
    line = 1
    try:
        next(reader)
        # A quoted caption may contain line breaks, so a row starts on the line after the end of the previous row.
        line = reader.line_num + 1
        for columns in reader:
            if len(columns) == len(_HEADER):
                yield _Row(line, columns[0].strip(), columns[1])
            elif columns:
                faults.append(f"{path}:{line}: expected 2 columns, got {len(columns)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: not valid CSV ({error}). Fix the quotes.") from error
    if faults:
        raise UserError(f"{summarize(faults)}. Quote captions that contain a comma.")


def _parse_token_lines(path: Path, text: str) -> Iterator[_Row]:
    faults = []
    for line_number, line in enumerate(text.split("\n"), start=1):
        if match := _TOKEN_LINE.fullmatch(line.removesuffix("\r")):
            yield _Row(line_number, match["name"].strip(), match["caption"])
        elif line.strip():
            faults.append(f"{path}:{line_number}: expected {_TOKEN_FORMAT}, got {line[:_MAX_SHOWN]!r}")
    if faults:
        raise UserError(f"{summarize(faults)}. Fix these lines.")
