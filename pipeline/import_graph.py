"""The static import graph of the project: which sources a stage runs.

`python -m pipeline.import_graph` (`make deps`) rewrites the module lists in every dvc.yaml from it, and the fingerprint
of unfinished work is computed from the same graph, so both always name the code that a stage runs.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DVC_FILES = ("dvc.yaml", "data/scenes/dvc.yaml")

_STAGE = re.compile(r"^  (\w+):\n", re.MULTILINE)
_LIST = re.compile(r"(?:      - \S+\n)+")
_MODULE_DEP = re.compile(r"^      - (?:pipeline|stages)/\S+\.py\n", re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Path of every module of the project by its dotted name."""
    found = {}
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the project that a module imports, also inside functions."""
    named = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(named & modules().keys())


def reachable(module: str) -> list[str]:
    """Modules that a module runs, itself included, in alphabetical order; a package with only a docstring runs none."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports(name)
    return sorted(name for name in seen if len(_parse(name).body) > 1)


def code_digest(module: str) -> str:
    """SHA-256, in hexadecimal, of all code that a module runs.

    Comments, docstrings and layout are left out: rewording them never invalidates unfinished work. So is the package
    root, which holds only the version number.
    """
    digest = hashlib.sha256()
    for name in reachable(module):
        if name == "pipeline":
            continue
        digest.update(f"{name} {ast.dump(_without_docstrings(_parse(name)))}\n".encode())
    return digest.hexdigest()


def stage_module(command: str) -> str:
    """Module that a stage's command runs: what follows `-m`."""
    words = command.split()
    return words[words.index("-m") + 1]


def module_deps(module: str) -> list[str]:
    """Paths, relative to the repository, of the sources that a module runs: the dependencies of its stage."""
    return sorted(modules()[name].relative_to(ROOT).as_posix() for name in reachable(module))


def with_module_deps(text: str) -> str:
    """Replace the module lists in the text of a dvc.yaml with those of the import graph; all else stays as it is."""
    stages = YAML(typ="safe", pure=True).load(text)["stages"]
    starts = [match for match in _STAGE.finditer(text, text.index("\nstages:")) if match[1] in stages]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    parts = [text[: starts[0].start()]]
    for match, end in zip(starts, ends, strict=True):
        lines = "".join(f"      - {path}\n" for path in module_deps(stage_module(stages[match[1]]["cmd"])))
        block = _MODULE_DEP.sub("", text[match.start() : end])
        head, deps, rest = block.partition("    deps:\n")
        data = _LIST.match(rest)
        place = data.end() if data else 0
        parts.append(head + deps + rest[:place] + lines + rest[place:])
    return "".join(parts)


def main(files: Iterable[str] = DVC_FILES) -> None:
    """Rewrite the module lists of the dvc.yaml files and name the files that changed."""
    for path in map(ROOT.joinpath, files):
        text = path.read_text(encoding="utf-8")
        updated = with_module_deps(text)
        if updated != text:
            path.write_text(updated, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: module lists updated", file=sys.stderr)


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_bytes())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    class Strip(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            # Docstrings of modules, classes, functions and fields are all bare string expressions.
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    stripped: ast.Module = Strip().visit(ast.parse(ast.unparse(tree)))
    return stripped


if __name__ == "__main__":
    main()
