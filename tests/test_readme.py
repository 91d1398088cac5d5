"""The README: short, true, and the same number on both sides of its first screen."""

import re
from pathlib import Path

import pytest
from benchmark.cases import CROSS_ENTROPY, OURS
from benchmark.measuring import BOTH, PASSES
from build_docs import recorded_results
from documents import SNIPPET, promised, run_snippet

from torch_sce.crosscheck.command import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = SNIPPET.findall(README)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_prints_what_it_says(snippet, request):
    if "tensorflow" in snippet:
        request.getfixturevalue("tensorflow")
    assert promised(snippet) and run_snippet(snippet) == promised(snippet)


def test_both_sides_of_the_first_screen_print_the_same_number():
    keras, ours = map(promised, SNIPPETS[:2])
    assert "tf.keras" in SNIPPETS[0] and "torch_sce" in SNIPPETS[1] and keras == ours
    assert README.index(SNIPPETS[1]) < 1500


def test_its_figures_of_time_and_memory_are_those_of_the_recorded_benchmark():
    (section,) = re.findall(r"## Speed\n\n(.*?)\n\n", README, re.DOTALL)
    shape, *printed = re.findall(r"`(\(1024, 32000\))`|(\d+\.\d+)", section)
    results = {each.case.name: each for each in recorded_results()}
    quiet, busy = (results[f"logits {shape[0]}{aside}"] for aside in ("", ", busy cores"))
    times = [
        f"{each.ratio(CROSS_ENTROPY, which):.1f}" for each in (quiet, busy) for which in PASSES
    ]
    peaks = [f"{quiet.peak(name, BOTH):.2f}" for name in (CROSS_ENTROPY, OURS)]
    assert [number for _, number in printed] == [*times[:2], *peaks, *times[2:]]


def test_its_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert f"{CASES} random cases" in README


def test_its_tree_names_what_is_there():
    (tree,) = re.findall(r"```\n(torch_sce/ .*?)```", README, re.DOTALL)
    folder = ROOT
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        folder = folder if indent else ROOT / name
        assert (folder / name if indent else folder).exists(), name
