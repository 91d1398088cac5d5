"""Runs a script on several processes, by PyTorch's own command."""

import os
import subprocess
import sys

from filelock import FileLock  # PyTorch needs it, too

LIMIT = 240  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(ranks, *arguments, fails=False):
    """The finished run; again if a thread of PyTorch's has aborted a rank that was ending."""
    command = [*TORCHRUN, str(ranks), *map(str, arguments)]
    done = subprocess.run(command, timeout=LIMIT, capture_output=True, text=True)
    for _ in range(2):
        if "terminate called without an active exception" in done.stderr:
            done = subprocess.run(command, timeout=LIMIT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def once(name, tmp_path_factory, run):
    """The folder that `run` has filled: once for all of pytest's workers, of which others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(folder)
    return folder
