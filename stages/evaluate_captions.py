"""Stage `evaluate`: score the generated captions, and write figures, the report and the model card."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import fresh_folder, publish_together
from pipeline.captions.records import Split
from pipeline.device import DeviceOption, setup_device
from pipeline.errors import run
from pipeline.params import load, load_key, read_yaml, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file; the report shows all sections.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens and vocabulary, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    model: Annotated[Path, typer.Option(help="Model folder, from `refine`.")],
    generated: Annotated[Path, typer.Option(help="Folder of captions and attention, from `generate`.")],
    metrics: Annotated[Path, typer.Option(help="Output folder of metrics, as JSON.")],
    plots: Annotated[Path, typer.Option(help="Output folder of plots.")],
    report: Annotated[Path, typer.Option(help="Output HTML file of the report.")],
    card: Annotated[Path, typer.Option(help="Output Markdown file of the model card.")],
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Batch size of teacher forcing, in images.")] = 32,
) -> None:
    """Score and analyze the generated captions of a split, and write figures, the report and the model card."""
    # Imported here so that --help is fast.
    from pipeline.evaluation.dataset_stats import compute_stats
    from pipeline.evaluation.evaluate import EvaluateInputs, EvaluateParams, analyze, read_inputs, score
    from pipeline.report.draw import draw
    from pipeline.report.model_card import write_model_card
    from pipeline.report.report import build_report, write_report

    evaluate_params, torch_device = load(params, "evaluate", EvaluateParams), setup_device(device)
    split: Split = load_key(params, "generate.split", Split)
    image_dir: Path = load_key(params, "dataset.root", Path) / load_key(params, "dataset.images", str)
    inputs = EvaluateInputs(
        prepared=prepared, image_dir=image_dir, tokens=tokens, features=features, model=model, generated=generated
    )
    data = read_inputs(inputs, split)
    # Before the decoder, so that the largest memory of the two is not added: COCO's captions take 280 MB.
    dataset = compute_stats(prepared, image_dir, tokens, features, data.store)
    # Other stages write to the folder of metrics too, so its files are published one by one.
    with fresh_folder(metrics) as folder:
        metrics_dir, plots_dir = folder / "metrics", folder / "plots"
        report_file, card_file = folder / "report.html", folder / "model_card.md"
        with ThreadPoolExecutor(max_workers=1) as pool:
            figures = pool.submit(draw, data, evaluate_params, plots_dir)  # while Java computes METEOR
            scores = score(data, evaluate_params, metrics_dir)
            figures.result()
        analysis = analyze(data, scores.corpus, evaluate_params, metrics_dir, torch_device, batch_size)
        write_report(report_file, build_report(data, scores, analysis, dataset, evaluate_params, read_yaml(params)))
        write_model_card(card_file, data.model.config, data.history, data.refine_history, scores.summary)
        require_unchanged(params, "evaluate", evaluate_params)
        metrics_files = {metrics / path.name: path for path in sorted(metrics_dir.iterdir())}
        publish_together({**metrics_files, plots: plots_dir, report: report_file, card: card_file})


if __name__ == "__main__":
    run(main)
