"""Each way a row can be computed.

By the CPU's kernels in one block or in many, with rows that do not count left out; by those of
any device; by PyTorch, where there are few predictions. And by Triton's: with --device cuda, or
with TRITON_INTERPRET=1, for which Triton interprets them on the CPU.
"""

import os

import torch

from torch_sce import kernels
from torch_sce.kernels import aten, cpu

SLOWEST = "triton, shared rows"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PATHS = {
    "small": {},
    "cpu": {"SMALL": 0},
    "cpu, many blocks": {"SMALL": 0, "BLOCK": 20, "LONG": 2},
    "any device": {"SMALL": 0, "_kernels": lambda z: aten},
    "any device, many blocks": {"SMALL": 0, "_kernels": lambda z: aten, "BLOCK": 20},
}
MODULES = [kernels, cpu, aten]
SAVING = [aten]  # modules whose forward pass saves a row's whole summary

if INTERPRETED or torch.get_default_device().type == "cuda":
    from torch_sce.kernels import cuda

    def triton(z):
        return aten if kernels.is_traced() or z.dtype == torch.float64 else cuda

    PATHS = {} if INTERPRETED else {key: PATHS[key] for key in PATHS if "any device" in key}
    PATHS |= {
        "triton": {"_kernels": triton},
        "triton, small tiles": {"_kernels": triton, "TILE": 32, "LONG": 16, "WIDE": 2},
        SLOWEST: {"_kernels": triton, "TILE": 4, "LONG": 4, "SHARED": 1},
    }
    MODULES = [kernels, aten, cuda]
    SAVING = [aten, cuda]


def take_path(name, monkeypatch):
    for key, value in PATHS[name].items():
        for module in MODULES:
            if key in vars(module):
                monkeypatch.setattr(module, key, value)
