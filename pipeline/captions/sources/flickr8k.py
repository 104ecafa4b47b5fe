"""Flickr8k caption files: the CSV form (`captions.txt`) and the official form (`Flickr8k.token.txt`).

Any folder of images with captions can be brought in as such a CSV file.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.captions.sources.parsed_file import Caption, Entry, Source, id_from_name, join_relative, read_text, some
from pipeline.errors import UserError

_HEADER = ["image", "caption"]
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")


class _Row(NamedTuple):
    line: int
    name: str
    caption: str


def read(path: Path, folder: str) -> Source:
    """Read one Flickr8k caption file whose images lie in `folder` below the image folder.

    The file's first line tells the form: the header `image,caption`, or `NAME#NUMBER`, a tab and a caption.
    Raises `UserError`, naming lines, where it is neither and where a line does not fit the form.
    """
    text = read_text(path)
    first = text.partition("\n")[0].strip()
    if [column.strip().strip('"') for column in first.split(",")] == _HEADER:
        rows = _csv_rows(path, text)
    elif _TOKEN_LINE.fullmatch(first):
        rows = _token_rows(path, text)
    else:
        raise UserError(
            f"{path}, line 1: wanted the header 'image,caption', or a line 'NAME#0', tab, caption, "
            f"got {first[:80]!r}; add the header or mend dataset.format"
        )
    by_name: dict[str, list[_Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return Source(entries=[_entry(path, folder, name, rows) for name, rows in by_name.items()], unmatched_captions=[])


def _entry(path: Path, folder: str, name: str, rows: list[_Row]) -> Entry:
    file = join_relative(folder, name)
    return Entry(
        image_id=id_from_name(file),
        file=file,
        place=f"{path}, line {rows[0].line}",
        split=None,
        captions=tuple(Caption(row.caption, f"{path}, line {row.line}") for row in rows),
    )


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    faults = []
    line = 1
    try:
        next(reader)
        # A quoted caption may hold line breaks: a row begins one line after the end of the row before it.
        line = reader.line_num + 1
        for columns in reader:
            if len(columns) == len(_HEADER):
                yield _Row(line, columns[0].strip(), columns[1])
            elif columns:
                faults.append(f"line {line} has {len(columns)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: is no CSV row: {error}; mend its quotes") from error
    if faults:
        raise UserError(f"{path}: wanted 2 columns, image and caption, but {some(faults)}; quote captions with commas")


def _token_rows(path: Path, text: str) -> Iterator[_Row]:
    faults = []
    for number, line in enumerate(text.split("\n"), start=1):
        if match := _TOKEN_LINE.fullmatch(line.removesuffix("\r")):
            yield _Row(number, match["name"].strip(), match["caption"])
        elif line.strip():
            faults.append(f"line {number} is {line[:80]!r}")
    if faults:
        raise UserError(f"{path}: wanted lines 'NAME#0', tab, caption, but {some(faults)}; mend them")
