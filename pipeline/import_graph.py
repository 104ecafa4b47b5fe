"""The static import graph of the project: the modules that each stage runs.

`python -m pipeline.import_graph` (`make deps`) rewrites the module lists in every dvc.yaml from this graph. The
fingerprints of unfinished work cover the same modules.
"""

import ast
import hashlib
import io
import re
import sys
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipeline.params import parse_yaml

ROOT = Path(__file__).parents[1]
DVC_FILES = ("dvc.yaml", "data/scenes/dvc.yaml")

_STAGE = re.compile(r"^  (\w+):\n", re.MULTILINE)
_LIST = re.compile(r"(?:      - \S+\n)+")
_MODULE_DEP = re.compile(r"^      - (?:pipeline|stages)/\S+\.py\n", re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Return the path of every module of the project by its dotted name."""
    paths = {}
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of the project that a module imports, including imports inside functions."""
    names = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names & modules().keys())


def reachable(module: str) -> list[str]:
    """Return all modules that a module imports, directly or indirectly, and the module itself, sorted by name.

    Modules that hold only a docstring are omitted.
    """
    visited: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in visited:
            visited.add(name)
            pending += imports(name)
    return sorted(name for name in visited if len(_parse(name).body) > 1)


def code_digest(module: str) -> str:
    """Return the SHA-256, in hexadecimal, of all code that a module runs.

    Comments, docstrings and blank lines are excluded, so rewording them never invalidates unfinished work. The package
    root, which holds only the version number, is excluded too.
    """
    digest = hashlib.sha256()
    for name in reachable(module):
        if name != "pipeline":
            digest.update(f"{name}\n{_code(name)}\n".encode())
    return digest.hexdigest()


def stage_module(command: str) -> str:
    """Return the module that a stage's command runs, which follows `-m`."""
    words = command.split()
    return words[words.index("-m") + 1]


def module_deps(module: str) -> list[str]:
    """Return the paths, relative to the repository, of all modules that a stage's module runs."""
    return sorted(modules()[name].relative_to(ROOT).as_posix() for name in reachable(module))


def with_module_deps(text: str) -> str:
    """Replace only the module lists in the text of a dvc.yaml with those of the import graph."""
    stages = parse_yaml(text, "dvc.yaml")["stages"]
    starts = [match for match in _STAGE.finditer(text, text.index("\nstages:")) if match[1] in stages]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    parts = [text[: starts[0].start()]]
    for match, end in zip(starts, ends, strict=True):
        lines = "".join(f"      - {path}\n" for path in module_deps(stage_module(stages[match[1]]["cmd"])))
        block = _MODULE_DEP.sub("", text[match.start() : end])
        head, separator, tail = block.partition("    deps:\n")
        data_deps = _LIST.match(tail)
        end_of_data = data_deps.end() if data_deps else 0
        parts.append(head + separator + tail[:end_of_data] + lines + tail[end_of_data:])
    return "".join(parts)


def main(files: Iterable[str] = DVC_FILES) -> None:
    """Rewrite the module lists of the dvc.yaml files and print the names of changed files."""
    for path in map(ROOT.joinpath, files):
        text = path.read_text(encoding="utf-8")
        updated = with_module_deps(text)
        if updated != text:
            path.write_text(updated, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: module lists updated", file=sys.stderr)


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_bytes())


def _code(module: str) -> str:
    """Return the source of a module without comments, docstrings and blank lines.

    Works on the text, because `ast.dump` and `ast.unparse` differ between versions of Python.
    """
    source = modules()[module].read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(_parse(module)):
        # Docstrings of modules, classes, functions and fields are all bare string expressions.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


if __name__ == "__main__":
    main()
