"""Each path that computes a row.

By the CPU's kernels; by those of any device, in one block or in many. And by Triton's: with
--device cuda, or with TRITON_INTERPRET=1, for which Triton interprets them on the CPU.
"""

import os

import torch

from torch_sce import kernels
from torch_sce.kernels import aten, head

SLOWEST = "triton, shared rows"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PATHS = {
    "cpu": {},
    "any device": {"kernels_for": lambda z: aten},
    "any device, many blocks": {"kernels_for": lambda z: aten, "CPU_BLOCK": 20, "DEVICE_BLOCK": 20},
}
MODULES = [kernels, aten, head]
SAVING = [aten]  # modules whose forward pass saves a row's whole summary

if INTERPRETED or torch.get_default_device().type == "cuda":
    from torch_sce.kernels import cuda

    def triton(z):
        return aten if kernels.is_traced() or z.dtype == torch.float64 else cuda

    PATHS = {} if INTERPRETED else {key: PATHS[key] for key in PATHS if "any device" in key}
    PATHS |= {
        "triton": {"kernels_for": triton},
        "triton, small tiles": {"kernels_for": triton, "TILE": 32, "LONG": 16, "WIDE": 2},
        SLOWEST: {"kernels_for": triton, "TILE": 4, "LONG": 4, "SHARED": 1},
    }
    MODULES = [kernels, aten, head, cuda]
    SAVING = [aten, cuda]


def take_path(name, monkeypatch):
    for key, value in PATHS[name].items():
        for module in MODULES:
            if key in vars(module):
                monkeypatch.setattr(module, key, value)
