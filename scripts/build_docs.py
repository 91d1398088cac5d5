"""Writes the documentation that is made from the package: `make docs`.

    docs/differences.md   the table of what the cross-check draws
    docs/keras2.md        that of its profile keras2
    docs/explain.md       what `print(explain(...))` prints
    docs/speed.md         the tables of the recorded benchmark, docs/benchmark-cpu.json
    build/docs            the API reference, from the docstrings by pdoc

The pages have each generated part between two comments, and a test compares it with what is
written here.
"""

import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from benchmark.cases import (
    COMPILED,
    CROSS_ENTROPY,
    FRESH_MOVES,
    FUSED,
    HEAD,
    KERAS_TORCH,
    LINEAR,
    MOVES,
    OURS,
    PRODUCTS,
    TF_KERAS,
    Case,
)
from benchmark.measuring import BOTH, PASSES
from benchmark.report import UNFUSED
from benchmark.results import Result

import torch_sce
from torch_sce.crosscheck.differences import DIFFERENCES, Difference
from torch_sce.crosscheck.differences_keras2 import DIFFERENCES_KERAS2

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "build" / "docs"
# Their `__all__` are the public names.
PUBLIC = ("torch_sce", "torch_sce.metrics", "torch_sce.keras2", "torch_sce.keras2.metrics")
MODULES = (*PUBLIC, "torch_sce.reduction", "torch_sce.keras2.rules", "torch_sce.kernels.contract")


def main() -> int:
    """Writes everything; the exit code is 1 if a public name is missing from the reference."""
    for page, part in PARTS.items():
        page.write_text(with_part(page.read_text(), part()))
    build_reference(REFERENCE)
    missing = missing_names(REFERENCE)
    if missing:
        print(f"not in {REFERENCE}: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def differences_table(keras: str, differences: Iterable[Difference]) -> str:
    rows = [f"| where | {keras} | here |", "|---|---|---|"]
    rows += [f"| {each.where} | {each.keras} | {each.here} |" for each in differences]
    return "\n".join(rows)


def printed_explanation() -> str:
    """That of the example in docs/explain.md."""
    logits = torch.tensor([[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]])
    loss = torch_sce.SparseCategoricalCrossentropy()
    return f"```\n{torch_sce.explain(loss, torch.tensor([2, 1]), logits)}\n```"


COLUMNS = (CROSS_ENTROPY, COMPILED, KERAS_TORCH, TF_KERAS, MOVES, FRESH_MOVES)
HEAD_COLUMNS = (LINEAR, FUSED, PRODUCTS)


def recorded_results() -> list[Result]:
    """Those of the recorded benchmark."""
    results = []
    for entry in json.loads((ROOT / "docs" / "benchmark-cpu.json").read_text())["cases"]:
        case = Case(**entry["case"] | {"shape": tuple(entry["case"]["shape"])})
        results.append(Result(**entry | {"case": case}))
    return results


def speed_tables() -> str:
    """How many times our time the others take, and the memory, on quiet cores and on busy ones."""
    results = recorded_results()
    heads = [r for r in results if r.case.kind == HEAD]
    groups = {
        "": [r for r in results if r.case.kind != HEAD and not r.case.busy],
        "Beside a busy process on each core:\n\n": [r for r in results if r.case.busy],
        "Linear heads, (rows, features, classes), both passes:\n\n": heads,
    }
    return "\n\n".join(
        title + speed_table(group, HEAD_COLUMNS if group is heads else COLUMNS)
        for title, group in groups.items()
        if group
    )


def speed_table(results: list[Result], columns: tuple[str, ...]) -> str:
    passes = (BOTH,) if columns is HEAD_COLUMNS else PASSES
    heading = f"| predictions | {' | '.join(columns)} | peak memory |"
    rows = [speed_row(result, columns, passes) for result in results]
    return "\n".join([heading, "|---" * (len(columns) + 2) + "|", *rows])


def speed_row(result: Result, columns: tuple[str, ...], passes: tuple[str, ...]) -> str:
    theirs = UNFUSED[result.case.kind]
    cells = [
        " / ".join(f"{result.ratio(peer, which):.2f}" for which in passes)
        for peer in (theirs, *columns[1:])
    ]
    cells.append(", ".join(f"{result.peak(name, BOTH):.2f}" for name in (OURS, theirs)))
    shown = ["-" if "nan" in cell else cell for cell in (result.case.name, *cells)]
    return f"| {' | '.join(shown)} |"


PARTS = {
    ROOT / "docs" / "differences.md": partial(differences_table, "tf.keras 3", DIFFERENCES),
    ROOT / "docs" / "keras2.md": partial(differences_table, "tf_keras", DIFFERENCES_KERAS2),
    ROOT / "docs" / "explain.md": printed_explanation,
    ROOT / "docs" / "speed.md": speed_tables,
}


def with_part(page: str, part: str) -> str:
    """The page with this as its generated part."""
    bounds = r"(<!-- made by `make docs` -->\n).*?(\n<!-- end -->)"
    found, count = re.subn(bounds, lambda m: m[1] + part + m[2], page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"a page must have one generated part, got {count}")
    return found


def build_reference(folder: Path) -> None:
    """Any warning of pdoc's is an error."""
    from pdoc import pdoc, render  # not before: the tables need no pdoc

    render.configure(
        docformat="google",
        template_directory=ROOT / "docs" / "api",
        include_undocumented=False,
        footer_text=f"torch_sce {torch_sce.__version__}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc(*MODULES, output_directory=folder)


def missing_names(folder: Path) -> list[str]:
    """The public names that have no section of their own in the reference."""
    missing = []
    for module in PUBLIC:
        page = (folder / module.replace(".", "/")).with_suffix(".html").read_text()
        names = importlib.import_module(module).__all__
        own = [name for name in names if f'<section id="{name}">' in page]
        missing += [f"{module}.{name}" for name in names if name not in own]
    return missing


if __name__ == "__main__":
    sys.exit(main())
