"""Times losses whose classes are divided among ranks, and measures their memory.

    torchrun --nproc-per-node 2 scripts/benchmark_ranks.py

Each rank has a slice of the logits, (N, C / R), and gets the mean loss and the gradient of its
slice:

    class_group      `SparseCategoricalCrossentropy(class_group=...)`: three numbers a row are
                     exchanged
    DTensor          the same of a DTensor, without an option
    loss_parallel    PyTorch's own, in its context: `F.cross_entropy`
    gathered logits  the whole logits on every rank, and `F.cross_entropy`

A time is that of the slowest rank, between two barriers; the candidates take turns. A rank's memory
is the most that it has in use beyond its logits, among all ranks.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark.measuring import BOTH, PASSES, peak_memory, synchronize
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from torch_sce import SparseCategoricalCrossentropy

SHAPES = [(2048, 128256), (4096, 32000)]
OURS, OF_DTENSOR, PARALLEL, GATHER = "class_group", "DTensor", "loss_parallel", "gathered logits"

Step = Callable[[str], None]  # a pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times losses of classes divided among ranks.")
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("N", "C"),
                        help="rows and classes; may be given several times")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("run it by torchrun --nproc-per-node 2 scripts/benchmark_ranks.py")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    for rows, classes in options.shape or ():
        if rows < 1 or classes < int(os.environ["WORLD_SIZE"]):
            parser.error(f"--shape {rows} {classes}: each rank needs a row and a class")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for rows, classes in options.shape or SHAPES:
        table = measured(steps_of(rows, classes, mesh), options.rounds, device)
        table.title = f"({rows}, {classes}) float32 on {mesh.size()} ranks, {device}"
        if dist.get_rank() == 0:
            Console(width=100).print(table)
    dist.barrier()
    dist.destroy_process_group()


def steps_of(rows: int, classes: int, mesh: DeviceMesh) -> dict[str, Step]:
    """What each candidate does in a forward pass, or in both."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (rows,), generator=generator).to(mesh.device_type)
    size = -(-classes // mesh.size())
    start = size * mesh.get_local_rank()
    part = torch.randn(rows, max(0, min(size, classes - start)), generator=generator)
    part = part.to(mesh.device_type).requires_grad_()
    shape, placements = torch.Size([rows, classes]), [Shard(1)]
    spread = DTensor.from_local(
        part.detach(), mesh, placements, shape=shape, stride=(classes, 1)
    ).requires_grad_()
    labels = distribute_tensor(y, mesh)
    ours = SparseCategoricalCrossentropy(True)
    of_slices = SparseCategoricalCrossentropy(True, class_group=mesh.get_group())

    def step(leaf: Tensor, loss: Callable[[], Tensor]) -> Step:
        def run(which: str) -> None:
            with torch.set_grad_enabled(which == BOTH):
                value = loss()
                if which == BOTH:
                    torch.autograd.grad(value, leaf)

        return run

    def in_parallel(which: str) -> None:
        with loss_parallel():
            step(spread, lambda: F.cross_entropy(spread, labels))(which)

    return {
        OURS: step(part, lambda: of_slices(y, part)),
        OF_DTENSOR: step(spread, lambda: ours(labels, spread)),
        PARALLEL: in_parallel,
        GATHER: step(spread, lambda: F.cross_entropy(whole(spread), y)),
    }


def whole(x: Any) -> Tensor:
    return x.full_tensor()


def measured(steps: dict[str, Step], rounds: int, device: str) -> Table:
    seconds = {(name, which): list[float]() for name in steps for which in PASSES}
    for done in range(rounds + 1):
        for (name, which), found in seconds.items():
            found += [duration(steps[name], which, device)] if done else []  # the first warms up
            if not done:
                steps[name](which)
    times = {key: median(found) for key, found in seconds.items()}
    table = Table("", *(f"{which}, ms" for which in PASSES), f"times {OURS}'s", "memory, MiB")
    for name, step in steps.items():
        ratios = [f"{times[name, which] / times[OURS, which]:.2f}" for which in PASSES]
        table.add_row(
            name,
            *(f"{1e3 * times[name, which]:.1f}" for which in PASSES),
            " / ".join(ratios),
            memory(step, device),
        )
    return table


def duration(step: Step, which: str, device: str) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    step(which)
    synchronize(device)
    return largest(time.perf_counter() - start, device)


def memory(step: Step, device: str) -> str:
    found = peak_memory(lambda: step(BOTH), device)
    most = largest(-1 if found is None else found, device)
    return "unknown" if most < 0 else f"{most / 2**20:.1f}"


def largest(number: float, device: str) -> float:
    """That of any rank."""
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


if __name__ == "__main__":
    sys.exit(main())
