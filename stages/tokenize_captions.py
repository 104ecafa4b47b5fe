"""Stage `tokenize`: captions to token ids, and the vocabulary of the train split."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.captions import tokens, vocabulary
from pipeline.captions.records import RECORDS_FILE, read_records
from pipeline.errors import run
from pipeline.params import load, plain, require_unchanged
from pipeline.publish import file_digest, fingerprint, fresh_folder, publish, write_json


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `tokenize` is read.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    out: Annotated[Path, typer.Option(help="Folder to publish: vocabulary.json and tokens.h5.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the counts.")],
) -> None:
    """Tokenise the captions of every split and build the vocabulary from the train captions."""
    settings = load(params, "tokenize", tokens.TokenizeParams)
    dataset = tokens.tokenize(read_records(prepared), settings, prepared / RECORDS_FILE)
    name = fingerprint(
        schema=tokens.SCHEMA_VERSION, params=plain(settings), records=file_digest(prepared / RECORDS_FILE)
    )
    with fresh_folder(out) as folder:
        vocabulary.write_vocabulary(folder / tokens.VOCABULARY_FILE, dataset.vocabulary)
        tokens.write_tokens(folder / tokens.TOKENS_FILE, dataset, settings, name)
        require_unchanged(params, "tokenize", settings)
        publish(folder, out)
    write_json(metrics, dataset.counts)


if __name__ == "__main__":
    run(main)
