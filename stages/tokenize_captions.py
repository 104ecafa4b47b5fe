"""Stage `tokenize`: build the vocabulary and convert every caption to token ids."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish_together, write_json
from pipeline.errors import run
from pipeline.params import load, load_key, require_unchanged, to_plain

logger = logging.getLogger("gridcap")


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `tokenize` and `train.text`.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    out: Annotated[Path, typer.Option(help="Output folder of vocabulary.json and tokens.h5.")],
    metrics: Annotated[Path, typer.Option(help="Output JSON file of metrics.")],
) -> None:
    """Tokenize captions and text, and build the vocabulary from the train captions and the text."""
    # Imported here so that --help is fast.
    from pipeline.captions.records import RECORDS_FILE, iter_records
    from pipeline.captions.sources.text_file import read_text_captions
    from pipeline.captions.tokenizer import TokenizeParams
    from pipeline.captions.tokens import SCHEMA, TOKENS_FILE, tokenize, write_tokens
    from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary

    tokenize_params = load(params, "tokenize", TokenizeParams)
    text_path = load_key(params, "train.text", Path | None)
    text = [] if text_path is None else read_text_captions(text_path)
    records_file = prepared / RECORDS_FILE
    dataset = tokenize(iter_records(prepared), tokenize_params, records_file, text)
    if text:
        num_captions, num_held_out = len(dataset.text.image_id), dataset.metrics["text_num_held_out"]
        logger.info(
            "tokenize: %d captions without images; %d more are left out, since they belong to val or test images",
            num_captions,
            num_held_out,
        )
    name = fingerprint(
        schema=SCHEMA.version, params=to_plain(tokenize_params), records=file_digest(records_file), text=text
    )
    with fresh_folder(out) as folder:
        tokens, metrics_file = folder / "tokens", folder / "metrics.json"
        write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
        write_tokens(tokens / TOKENS_FILE, dataset, tokenize_params, name)
        write_json(metrics_file, dataset.metrics)
        require_unchanged(params, "tokenize", tokenize_params)
        publish_together({out: tokens, metrics: metrics_file})


if __name__ == "__main__":
    run(main)
