"""What the tests of the README and of docs/ share."""

import re
import subprocess
import sys

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def scripts_of(page: str) -> dict[str, str]:
    """The snippets whose first line is the name of a file; those of one file are joined."""
    scripts: dict[str, str] = {}
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        scripts[name] = scripts.get(name, "") + text
    return scripts


def promised(snippet: str) -> list[str]:
    """The output that the comments after its prints give."""
    return re.findall(r"print\(.*\)  # (.*)", snippet)


def run_snippet(snippet: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
