"""Imports point down: the layer table of the project, held as a test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "prune_llm_kernels": ROOT / "kernels" / "prune_llm_kernels",
    "prune_llm": ROOT / "prune_llm",
    "prune_llm_eval": ROOT / "eval" / "prune_llm_eval",
    "prune_llm_server": ROOT / "server" / "prune_llm_server",
}
ALLOWED = {
    "prune_llm_kernels": {"prune_llm_kernels"},
    "prune_llm": {"prune_llm", "prune_llm_kernels"},
    "prune_llm_eval": {"prune_llm_eval", "prune_llm", "prune_llm_kernels"},
    "prune_llm_server": {"prune_llm_server", "prune_llm", "prune_llm_kernels"},
}
# the composition root may import every layer
COMPOSITION_ROOT = {path.name for path in (ROOT / "prune_llm").glob("cli*.py")} | {"__main__.py"}
# what kernels must not know of: models and files
KERNELS_MUST_NOT = {"transformers", "safetensors", "datasets", "tokenizers", "huggingface_hub"}
# kernels and ops take tensors and numbers only: no object can bundle their parameters
MANY_PARAMETERS = {"gpu_triton.py", "gpu_triton_step.py", "gpu_ops.py"}
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "types.py"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            yield package, file


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(("package", "file"), list(modules()), ids=lambda v: getattr(v, "name", v))
def test_imports_point_down(package: str, file: Path) -> None:
    if file.name in COMPOSITION_ROOT and package == "prune_llm":
        return
    upward = (imported(file) & set(PACKAGES)) - ALLOWED[package]
    assert not upward, f"{file.relative_to(ROOT)} imports {upward}"
    if package == "prune_llm_kernels":
        assert not imported(file) & KERNELS_MUST_NOT


def test_outer_folders_are_not_packages() -> None:
    for folder in ("kernels", "eval", "server", "docker", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_without_a_noun() -> None:
    assert not [file for _, file in modules() if file.name in FORBIDDEN_NAMES]


def test_no_function_over_60_lines_or_7_parameters() -> None:
    """Positional parameters; keyword-only ones are named at every call."""
    offenders = []
    for _, file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                many = len(node.args.posonlyargs + node.args.args) > 8
                if lines > 60 or (many and file.name not in MANY_PARAMETERS):
                    offenders.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert offenders == []
