"""Each way a row can be computed.

By the CPU's kernels in one block or in many, with rows that do not count left out; by those of
any device; by PyTorch, where there are few predictions.
"""

from torch_sce import kernels
from torch_sce.kernels import aten, cpu

PATHS = {
    "small": {},
    "cpu": {"SMALL": 0},
    "cpu, many blocks": {"SMALL": 0, "BLOCK": 20, "SAMPLE": 20, "ROWS": 3, "LONG": 2},
    "any device": {"SMALL": 0, "_kernels": lambda z: aten},
    "any device, many blocks": {"SMALL": 0, "_kernels": lambda z: aten, "BLOCK": 20},
}


def take_path(name, monkeypatch):
    for key, value in PATHS[name].items():
        for module in (kernels, cpu, aten):
            if key in vars(module):
                monkeypatch.setattr(module, key, value)
