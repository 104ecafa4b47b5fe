import ast
from pathlib import Path

import pytest

from pipeline import import_graph
from pipeline.import_graph import DVC_FILES, ROOT, code_digest, module_deps, reachable, with_module_deps


def test_reachable_modules_are_direct_and_indirect_imports() -> None:
    names = reachable("stages.prepare_captions")
    assert {"stages.prepare_captions", "pipeline.captions.sources.coco", "pipeline.errors"} <= set(names)
    assert not any(name.startswith(("pipeline.training", "pipeline.report")) for name in names)
    # A package that holds only a docstring runs no code.
    assert "pipeline.captions" not in names


def test_training_imports_neither_evaluation_nor_report() -> None:
    names = reachable("pipeline.training.trainer")
    assert [name for name in names if name.startswith(("pipeline.report", "pipeline.evaluation"))] == []
    assert "pipeline.training.live_metrics" not in names


@pytest.mark.parametrize("file", DVC_FILES)
def test_module_lists_in_dvc_yaml_are_up_to_date(file: str) -> None:
    text = (ROOT / file).read_text()
    assert with_module_deps(text) == text, "run `make deps`"


def test_module_lists_are_replaced_and_data_deps_are_kept() -> None:
    text = """\
vars: []

stages:
  prepare:
    cmd: python -m stages.prepare_captions --out x
    deps:
      - data/in
      - pipeline/removed.py
    outs:
      - x
"""
    lines = "".join(f"      - {path}\n" for path in module_deps("stages.prepare_captions"))
    updated = with_module_deps(text)
    assert updated == text.replace("      - pipeline/removed.py\n", lines)
    assert with_module_deps(updated) == updated


def test_comments_and_docstrings_do_not_change_the_code_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "base": '"""Doc."""\n\nRATE = 0.1\n"""Field doc."""\n\ndef f(x):\n    """Doc."""\n    return x  # comment\n',
        "reworded": '"""Other."""\n\nRATE = 0.1\n\n\ndef f(x):\n    # another comment\n    return x\n',
        "changed": '"""Doc."""\n\nRATE = 0.2\n"""Field doc."""\n\ndef f(x):\n    """Doc."""\n    return x\n',
    }
    digests = {}
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        monkeypatch.setattr(import_graph, "_parse", lambda _, source=source: ast.parse(source))
        monkeypatch.setattr(import_graph, "modules", lambda path=path: {"m": path})
        import_graph.imports.cache_clear()
        digests[name] = code_digest("m")
    import_graph.imports.cache_clear()
    assert digests["base"] == digests["reworded"]
    assert digests["base"] != digests["changed"]
