"""Heavy libraries are imported inside the function that needs them, and only where they belong.

import-linter (pyproject.toml) sees modules, not functions; this reads the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("fabrictune", "services") for path in (ROOT / folder).rglob("*.py"))

HEAVY = {
    # library: the folders and files (from the root) that may import it, inside functions
    "torch": ("services/training", "services/inference", "services/common/base_models.py", "fabrictune/local.py"),
    "transformers": ("services", "fabrictune/local.py"),
    "peft": ("services/training", "services/merging/peft_engine.py"),
    "swift": ("services/training",),
    "vllm": ("services/inference",),
    "matplotlib": ("services/training", "services/evaluation", "services/conversion"),
}

LOADED_BY_THE_ENGINE = {
    # module: the engine that imports it, in its own process, as a plug-in; at module level there
    "services/training/swift_plugin.py": "swift",
    "services/training/swift_mean.py": "swift",
    "services/training/swift_attention.py": "swift",
    "services/inference/tool_parser.py": "vllm",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_where_they_belong(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text(), name)
    if name not in LOADED_BY_THE_ENGINE:
        at_import = [f"{name}:{line} {library}" for line, library in imports(tree.body) if library in HEAVY]
        assert at_import == [], "imported when the module is: move it into the function that needs it"
    for line, library in imports(list(ast.walk(tree))):
        if library in HEAVY:
            assert name.startswith(HEAVY[library]), f"{name}:{line} imports {library}"


def imports(nodes: list[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of the import statements among `nodes`, those under `if` and `try` included."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Try):
            yield from imports([*node.body, *(statement for handler in node.handlers for statement in handler.body)])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from imports([*node.body, *node.orelse])
