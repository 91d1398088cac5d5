"""Runs a script on several processes, by PyTorch's own command."""

import subprocess
import sys

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
