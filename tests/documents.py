"""What the tests of the README and of docs/ share."""

import re
import subprocess
import sys

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


def promised(snippet: str) -> list[str]:
    """The output that the comments after its prints give."""
    return re.findall(r"print\(.*\)  # (.*)", snippet)


def run_snippet(snippet: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
