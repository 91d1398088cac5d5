"""docs/: snippets run, generated parts are up to date, links and names lead somewhere."""

import doctest
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import build_docs
import pytest
from documents import SNIPPET, promised, run_snippet
from mutations import MUTATIONS, OF_HEADS

import torch_sce
from torch_sce import keras2, metrics
from torch_sce.crosscheck.campaign import drawn
from torch_sce.crosscheck.cases import LOSSES
from torch_sce.crosscheck.command import CASES, SEED, main
from torch_sce.crosscheck.differences import DIFFERENCES

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = DOCS | {
    name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
}
# A first line with the name of a file makes a snippet a part of it: test_guide runs those.
SNIPPETS = [
    (name, snippet)
    for name, text in DOCS.items()
    for snippet in SNIPPET.findall(text)
    if not re.match(r"# \w+\.py\n", snippet)
]


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_a_snippet_prints_what_it_says(page, snippet):
    if "transformers" in snippet:
        pytest.importorskip("transformers")
    assert promised(snippet) and run_snippet(snippet) == promised(snippet)


@pytest.mark.parametrize("path", build_docs.PARTS, ids=lambda path: path.name)
def test_a_generated_part_is_up_to_date(path):
    """If not, `make docs` writes it."""
    page = path.read_text()
    assert page == build_docs.with_part(page, build_docs.PARTS[path]())


def test_what_explain_prints_is_that_of_the_snippet_above_it():
    (snippet,) = [text for page, text in SNIPPETS if page == "explain.md"]
    names: dict[str, object] = {}
    exec(snippet, names)
    assert build_docs.printed_explanation() == f"```\n{names['found']}\n```"


def test_the_page_of_differences_has_every_row():
    lines = [line for line in DOCS["differences.md"].splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines]
    assert all(len(row) == 3 for row in rows) and len(rows) == len(set(rows)) + 1  # two headers
    for difference in DIFFERENCES:
        assert (difference.where, difference.keras, difference.here) in rows, difference.name


ROWS = re.findall(
    r"^\| [^|]* \| [^|]* \| `([^`|]*)` \| `(.*)` \|$", DOCS["metrics.md"], re.MULTILINE
)


@pytest.mark.parametrize(("line", "printed"), ROWS)
def test_a_line_of_the_table_of_losses_and_metrics_prints_what_it_says(line, printed):
    (setting,) = [text for page, text in SNIPPETS if page == "metrics.md"]
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


def test_the_lines_of_the_cross_check_are_those_of_the_recorded_run(capsys):
    """Not the numbers: they depend on the CPU, which the page names."""
    page = DOCS["cross-check.md"]
    assert main(["--oracle", "recorded"]) == 0
    printed = re.sub(r"[\d.]+", "N", capsys.readouterr().out)
    (block,) = re.findall(r"```\n(Error of the value.*?)\n```", page, re.DOTALL)
    for line in block.splitlines():
        assert re.sub(r"[\d.]+", "N", line) in printed
    count = sum(1 for _ in drawn(SEED, range(CASES)))  # with and without a head
    assert f" of {count} cases agree" in block and " 0 mismatches" in block
    assert f"{CASES} random cases" in page
    assert f"{len(MUTATIONS) + len(OF_HEADS)} deliberate mutations" in re.sub(r"\s+", " ", page)


LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if "://" not in link
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    target, _, anchor = link.partition("#")
    folder = ROOT / "docs" if page in DOCS else ROOT
    path = folder / target if target else folder / page
    assert path.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in slugs


FILES = r"`((?:torch_sce|tests|scripts|docs|notebooks)/[\w./]*)`"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_the_files_it_names_exist(page):
    missing = [name for name in re.findall(FILES, PAGES[page]) if not (ROOT / name).exists()]
    assert missing == []


def test_the_names_in_the_architecture_and_the_guide_to_contributing_exist():
    """`module.name` in these pages is a name in a module of the package."""
    modules = {
        path.relative_to(ROOT / "torch_sce").with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "torch_sce").rglob("*.py")
    }
    modules |= {module.removesuffix(".__init__") for module in modules} - {"__init__"}
    found = 0
    for page in ("architecture.md", "CONTRIBUTING.md"):
        for text in re.findall(r"`([a-z_.0-9]+\.\w+)(?:\([^`]*\))?`", PAGES[page]):
            module, _, name = text.rpartition(".")
            if module in modules and name not in ("py", "md"):
                found += 1
                assert hasattr(importlib.import_module(f"torch_sce.{module}"), name), text
    assert found > 20


@pytest.mark.skipif(find_spec("pdoc") is None, reason="needs pdoc")
def test_every_public_name_is_in_the_api_reference(tmp_path):
    build_docs.build_reference(tmp_path)
    assert build_docs.missing_names(tmp_path) == []
    page = tmp_path / "torch_sce.html"
    page.write_text(page.read_text().replace('<section id="explain">', ""))
    assert build_docs.missing_names(tmp_path) == ["torch_sce.explain"]
    named = {module.__name__ for module in (torch_sce, metrics, keras2, keras2.metrics)}
    assert set(build_docs.PUBLIC) == named


def test_the_hooks_and_the_workflow_use_the_commands_of_the_makefile():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"entry: (.*)", hooks)
    assert [shlex.split(entry)[0] for entry in entries] == [".venv/bin/ruff"] * 2
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert re.findall(r"run: make (\S+)", workflow) == ["lint", "test", "docs"]
    steps = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^make (\S+)$", steps, re.MULTILINE)
    assert commands == ["lint", "test", "notebooks", "test-frameworks"]


def test_the_versions_of_the_frameworks_are_those_that_are_installed():
    """By `make test-frameworks`, with these constraints."""
    rows = re.findall(r"^\| \[.*?\| (.*?) \|", DOCS["frameworks.md"], re.MULTILINE)
    versions = re.findall(r"`([\w-]+)` ([\d.]+)", " ".join(rows))
    assert len(versions) == 11 > len(rows)
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in versions} <= set(constraints)
