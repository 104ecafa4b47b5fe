"""Stage `tokenize`: build the vocabulary and convert every caption to token ids."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish_together, write_json
from pipeline.captions.records import RECORDS_FILE, read_records
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import SCHEMA, TOKENS_FILE, tokenize, write_tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary
from pipeline.errors import run
from pipeline.params import load, require_unchanged, to_plain


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `tokenize`.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    out: Annotated[Path, typer.Option(help="Output folder of vocabulary.json and tokens.h5.")],
    metrics: Annotated[Path, typer.Option(help="Output JSON file of metrics.")],
) -> None:
    """Tokenize the captions of every split and build the vocabulary from the train captions."""
    tokenize_params = load(params, "tokenize", TokenizeParams)
    records_file = prepared / RECORDS_FILE
    dataset = tokenize(read_records(prepared), tokenize_params, records_file)
    name = fingerprint(schema=SCHEMA.version, params=to_plain(tokenize_params), records=file_digest(records_file))
    with fresh_folder(out) as folder:
        tokens, metrics_file = folder / "tokens", folder / "metrics.json"
        write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
        write_tokens(tokens / TOKENS_FILE, dataset, tokenize_params, name)
        write_json(metrics_file, dataset.metrics)
        require_unchanged(params, "tokenize", tokenize_params)
        publish_together({out: tokens, metrics: metrics_file})


if __name__ == "__main__":
    run(main)
