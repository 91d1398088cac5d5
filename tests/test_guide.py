"""docs/porting.md: its scripts run in order, and its table is true in three libraries."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import scripts_of

GUIDE = (Path(__file__).parent.parent / "docs" / "porting.md").read_text()
SCRIPTS = scripts_of(GUIDE)
ROW = re.compile(r"^\| `(KC?\(.*?)` \| `(.*?)` \| (\S+) \| `(.*?)` \| (\S+) \|$", re.MULTILINE)

KERAS = """
import json, sys
import keras, numpy as np
K, KC = keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy
arrays = {name: np.array(value, dtype) for name, (value, dtype) in json.load(sys.stdin).items()}
class Labels(np.ndarray):
    def int(self):
        return self.astype("int32")
arrays = {name: value.view(Labels) for name, value in arrays.items()}
found = []
for line in sys.argv[1:]:
    try:
        found.append(float(eval(line, {"K": K, "KC": KC} | arrays)))
    except Exception as error:
        found.append("raises")
print(json.dumps(found))
"""


def run(code, folder, *arguments, given=None):
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, input=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("tensorflow")
def test_its_scripts_run_and_print_what_they_say(tmp_path):
    names = ["which_keras.py", "train_keras.py", "train_torch.py", "layers.py", "table.py"]
    assert list(SCRIPTS) == names
    commands = []
    for script in SCRIPTS.values():
        printed = run(script, tmp_path).splitlines()
        commands += [line for line in printed if line.startswith(".venv/bin/python scripts/")]
        promised = re.findall(r"print\(.*\)  # (.*)", script)
        assert promised and [line for line in printed if line in promised] == promised, printed
    line = commands[0].split()
    script = Path(__file__).parent.parent / line[1]
    done = subprocess.run(
        [sys.executable, script, *line[2:]], capture_output=True, cwd=tmp_path, text=True
    )
    assert done.returncode == 0 and (tmp_path / "batch.html").exists(), done.stderr
    assert "fits code that divides by the weights, as `F.cross_entropy(weight=" in done.stdout


@pytest.mark.usefixtures("tensorflow")
def test_the_table_is_true_in_all_three_libraries(tmp_path):
    rows = ROW.findall(GUIDE)
    assert len(rows) == GUIDE.count("\n| `K")
    names: dict = {}
    exec(SCRIPTS["table.py"].split("losses = ")[0], names)
    tensors = ("z", "p", "y", "t", "pad", "none", "w", "cw", "zs", "ys", "sq", "ysq")
    given = {n: (names[n].tolist(), str(names[n].dtype).removeprefix("torch.")) for n in tensors}
    keras = json.loads(run(KERAS, tmp_path, *(row[0] for row in rows), given=json.dumps(given)))
    for (theirs, ours, both, pytorch, other), found in zip(rows, keras, strict=True):
        assert shown(found) == both, theirs
        assert evaluated(ours, names) == both, ours
        assert evaluated(pytorch, names) == other, pytorch


def evaluated(line, names):
    try:
        return shown(eval(line, names).item())
    except (ValueError, RuntimeError, IndexError):
        return "raises"


def shown(value):
    return value if isinstance(value, str) else f"{value:.4f}"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)[^)]*\)", GUIDE))
def test_its_links_lead_somewhere(link):
    assert (Path(__file__).parent.parent / "docs" / link).exists()
