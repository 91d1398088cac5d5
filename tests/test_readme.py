"""The README: its snippets run and print what they say, its figures are those of a run."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_crosscheck import MUTATIONS

from torch_sce import metrics
from torch_sce.crosscheck.cases import LOSSES
from torch_sce.crosscheck.command import CASES, main

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_prints_what_it_says(snippet, request):
    if "tensorflow" in snippet:
        request.getfixturevalue("tensorflow")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert promised and done.stdout.splitlines() == promised


def test_both_sides_of_the_first_screen_print_the_same_number():
    keras, ours = (re.findall(r"print\(.*\)  # (.*)", snippet) for snippet in SNIPPETS[:2])
    assert "tf.keras" in SNIPPETS[0] and "torch_sce" in SNIPPETS[1] and keras == ours
    assert README.index(SNIPPETS[1]) < 1500


def test_what_explain_prints_is_what_it_prints():
    (snippet,) = [snippet for snippet in SNIPPETS if "explain(" in snippet]
    names: dict[str, object] = {}
    exec(snippet, names)
    assert f"```\n{names['found']}\n```" in README


ROWS = re.findall(r"^\| [^|]* \| [^|]* \| `([^`|]*)` \| `(.*)` \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("line", "printed"), ROWS)
def test_a_line_of_the_table_of_losses_and_metrics_prints_what_it_says(line, printed):
    (setting,) = [snippet for snippet in SNIPPETS if "from torch_sce import metrics" in snippet]
    names: dict[str, object] = {}
    exec(setting, names)
    example = doctest.Example(line + "\n", printed + "\n")
    test = doctest.DocTest([example], names, line, None, None, None)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_table_has_every_loss_and_metric():
    lines = " ".join(line for line, _ in ROWS)
    for name in metrics.__all__:
        assert f"metrics.{name}(" in lines
    for name in LOSSES:
        assert f"torch_sce.{name}(" in lines


def test_its_lines_are_those_of_the_recorded_run(capsys):
    """Not the figures: they depend on the CPU, which is named beside them."""
    assert main(["--oracle", "recorded"]) == 0
    printed = re.sub(r"[\d.]+", "N", capsys.readouterr().out)
    (block,) = re.findall(r"```\n(Error of the value.*?)\n```", README, re.DOTALL)
    for line in block.splitlines():
        assert re.sub(r"[\d.]+", "N", line) in printed
    assert f" of {CASES} cases agree" in block and " 0 mismatches" in block
    assert f"{CASES} random questions" in README
    assert f"{len(MUTATIONS)} deliberate mutations" in re.sub(r"\s+", " ", README)
