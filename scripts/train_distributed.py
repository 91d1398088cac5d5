"""Trains a small language model on several processes, and compares with one process.

    torchrun --nproc-per-node 2 scripts/train_distributed.py --parallel ddp fsdp --head linear

A transformer predicts the next character of Shakespeare's speeches, which are padded to one length
in each micro-batch. How the ranks divide the work:

    ddp      every rank has the model and a part of each batch: `DistributedDataParallel`
    fsdp     the same, and the parameters are divided: `fully_shard`
    tensor   every rank has the whole batch and a part of the larger matrices, of the head some of
             the classes: `parallelize_module`
    2d       fsdp of ranks of which two divide the matrices

Three runs have the same batches and begin with the same weights:

    several processes   a step's loss is one mean over the labels of all ranks and micro-batches
    one process         the same mean, of the whole batch at once
    mean of means       several processes, each micro-batch has its own mean

The first two must end with the same losses and weights, except for rounding. The third one, as most
training loops have it, gives a label in a short speech more weight than one in a long speech. It
depends on how many parts a batch has: with `tensor` only micro-batches, otherwise ranks, too.
"""

import argparse
import gzip
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from torch_sce import LinearSparseCategoricalCrossentropy, SparseCategoricalCrossentropy

TEXT = Path(__file__).parent.parent / "notebooks" / "data" / "shakespeare.txt.gz"
PARALLEL, HEADS = ("ddp", "fsdp", "tensor", "2d"), ("plain", "linear")
SPEECHES, MICRO_BATCHES = 16, 2  # in a step of all ranks; in a step of each rank
LENGTH, WIDTH, BLOCKS, PARTS = 128, 64, 2, 4  # labels in a speech; of the model, of its attention
LEARNING_RATE, MOMENTUM = 0.1, 0.9
PADDING = -1
NONE = 1e-18  # how a plot shows a difference of 0

Batch = tuple[Tensor, Tensor]  # characters and labels, (B, T)
Step = Callable[[nn.Module, list[Batch]], Tensor]  # computes a loss and gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code is 1 if a run differs from one process."""
    options = parse(arguments)
    device = start()
    speeches, alphabet = read(TEXT)
    steps = [draw(speeches, alphabet, number) for number in range(options.steps)]
    found = []
    for head in options.head:
        setting = Setting(head, len(alphabet), getattr(torch, options.dtype), device)
        alone = train_alone(setting, steps) if dist.get_rank() == 0 else None
        for parallel in options.parallel:
            together, naive = train_together(setting, parallel, steps)
            if alone is not None:
                found.append(Comparison(f"{parallel}, {head}", together, naive, *alone))
                print(found[-1].text(), flush=True)
    if options.plot and found:
        plot(options.plot, found)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(each.agrees() for each in found) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small language model on several processes, and compares with one.",
        epilog="Exit code of torchrun: 0 if they agree, otherwise 1.",
    )
    add = parser.add_argument
    add("--parallel", nargs="+", choices=PARALLEL, default=["ddp"])
    add("--head", nargs="+", choices=HEADS, default=["plain"])
    add("--steps", type=int, default=60, help="(%(default)s)")
    add("--dtype", choices=("float32", "float64"), default="float64", help="(%(default)s)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the losses; needs matplotlib")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("run it by torchrun --nproc-per-node 2 scripts/train_distributed.py")
    ranks, most = int(os.environ["WORLD_SIZE"]), SPEECHES // MICRO_BATCHES
    if ranks > most:
        parser.error(f"needs at most {most} processes, as a step has {SPEECHES} speeches")
    if "2d" in options.parallel and ranks % 2:
        parser.error("--parallel 2d needs an even number of processes")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: must be at least 1")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if options.plot and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    return options


def start() -> torch.device:
    """Joins the other processes; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


# The data


def read(path: Path) -> tuple[list[str], str]:
    """Speeches, and the alphabet."""
    text = gzip.decompress(path.read_bytes()).decode("ascii")
    speeches = [speech[: LENGTH + 1] for speech in text.split("\n\n") if len(speech) > 1]
    return speeches, "".join(sorted(set(text)))


def draw(speeches: list[str], alphabet: str, number: int) -> list[Tensor]:
    """The speeches of a step, sorted by length, so that there is little padding."""
    chosen = sorted(random.Random(number).sample(speeches, SPEECHES), key=len)
    return [torch.tensor([alphabet.index(c) for c in speech]) for speech in chosen]


def padded(speeches: list[Tensor], device: torch.device) -> Batch:
    """The characters, and as labels those that follow."""
    x = pad_sequence([speech[:-1] for speech in speeches], batch_first=True)
    y = pad_sequence([speech[1:] for speech in speeches], batch_first=True, padding_value=PADDING)
    return x.to(device), y.to(device)


def of_rank(speeches: list[Tensor], data: DeviceMesh, device: torch.device) -> list[Batch]:
    """This rank's micro-batches. Each rank has as many, but they have uneven numbers of labels."""
    parts = MICRO_BATCHES * data.size()
    cuts = [len(speeches) * i // parts for i in range(parts + 1)]
    first = MICRO_BATCHES * data.get_local_rank()
    mine = range(first, first + MICRO_BATCHES)
    return [padded(speeches[cuts[i] : cuts[i + 1]], device) for i in mine]


# The model


class Block(nn.Module):
    """Attention and two layers, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention_in = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.attention_in(x).unflatten(-1, (3, PARTS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(seen.transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    """`forward` returns the loss: wrappers for several processes act on what `forward` computes."""

    def __init__(self, classes: int, loss: nn.Module) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(classes, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes, bias=False)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor, denominator: Tensor | None = None) -> Tensor:
        embedded = self.characters(x) + self.positions.weight[: x.shape[1]]
        hidden = self.norm(self.blocks(embedded))
        if isinstance(self.loss, LinearSparseCategoricalCrossentropy):
            weight: Any = self.head.weight
            if self.loss.class_group is not None:
                weight = weight.to_local()  # of this rank's classes
            return self.loss(y, hidden, weight, denominator=denominator)
        return self.loss(y, self.head(hidden), denominator=denominator)


class Setting(NamedTuple):
    """What is the same in all runs that are compared."""

    head: str
    classes: int
    dtype: torch.dtype
    device: torch.device

    def model(self, **groups: Any) -> LanguageModel:
        """The model with the weights that training begins with."""
        torch.manual_seed(0)
        return LanguageModel(self.classes, self.loss(**groups)).to(self.device, self.dtype)

    def loss(self, **groups: Any) -> nn.Module:
        if self.head == "linear":
            return LinearSparseCategoricalCrossentropy(PADDING, dtype=self.dtype, **groups)
        return SparseCategoricalCrossentropy(True, PADDING, dtype=self.dtype, **groups)


# Several processes


def make_mesh(parallel: str, device: torch.device) -> DeviceMesh:
    ranks = dist.get_world_size()
    tensor = {"tensor": ranks, "2d": 2}.get(parallel, 1)
    shape = (ranks // tensor, tensor)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))


def parallelized(model: LanguageModel, parallel: str, mesh: DeviceMesh) -> nn.Module:
    if parallel == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group("data"))
    if parallel in ("tensor", "2d"):
        plan = {
            "blocks.*.up": ColwiseParallel(),
            "blocks.*.down": RowwiseParallel(),
            "head": ColwiseParallel(use_local_output=True),  # plain tensors, of this rank's classes
        }
        parallelize_module(model, mesh["tensor"], plan)
    if parallel in ("fsdp", "2d"):
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])  # the head is whole in `forward`, for the loss
    return model


def accumulating(model: nn.Module, batches: list[Batch]) -> Iterator[Batch]:
    """The micro-batches. The ranks exchange gradients in the backward pass of the last one only."""
    for number, batch in enumerate(batches, 1):
        is_last = number == len(batches)
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = is_last  # as `no_sync` does
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
        yield batch


# Training


class Run(NamedTuple):
    losses: Tensor  # (steps,)
    weights: list[Tensor]  # at the end


def train_alone(setting: Setting, steps: list[list[Tensor]]) -> tuple[Run, float]:
    """One process with whole batches; and how much several processes may differ from it."""

    def run(setting: Setting) -> Run:
        step = one_mean(setting)
        batches = [[padded(speeches, setting.device)] for speeches in steps]
        dtype = str(setting.dtype).removeprefix("torch.")
        return train(setting.model(), batches, step, f"one process, {setting.head}, {dtype}")

    alone = run(setting)
    if setting.dtype == torch.float64:
        return alone, 1e-12
    # Several processes round the same sums in another order, so they should be about as near to the
    # exact result as one process is: from each other at most twice as far. Another factor of two
    # is for the chance in either distance.
    exact = run(setting._replace(dtype=torch.float64))
    return alone, 4 * difference(alone, exact)


def train_together(setting: Setting, parallel: str, steps: list[list[Tensor]]) -> tuple[Run, Run]:
    """Several processes: with one mean for each step, and with the mean of means."""
    mesh = make_mesh(parallel, setting.device)
    data = mesh.get_group("data")
    batches = [of_rank(speeches, mesh["data"], setting.device) for speeches in steps]
    groups = {"class_group": mesh.get_group("tensor")} if parallel in ("tensor", "2d") else {}
    model = parallelized(setting.model(process_group=data, **groups), parallel, mesh)
    naive = parallelized(setting.model(**groups), parallel, mesh)
    name = f"{parallel}, {setting.head}"
    return (
        train(model, batches, one_mean(setting, process_group=data), name),
        train(naive, batches, mean_of_means(data), f"{name}, mean of means"),
    )


def one_mean(setting: Setting, **group: Any) -> Step:
    """A step's loss is the mean over the labels of its micro-batches, of all ranks."""
    counting = SparseCategoricalCrossentropy(True, PADDING, **group)

    def step(model: nn.Module, batches: list[Batch]) -> Tensor:
        counts = [counting.denominator(y, (*y.shape, setting.classes)) for _, y in batches]
        n, parts = torch.stack(counts).sum(), []
        for x, y in accumulating(model, batches):
            part = model(x, y, n)
            part.backward()
            parts.append(part.detach())
        return torch.stack(parts).sum()

    return step


def mean_of_means(group: Any) -> Step:
    """A step's loss is the mean over ranks and micro-batches of their means."""

    def step(model: nn.Module, batches: list[Batch]) -> Tensor:
        parts = []
        for x, y in accumulating(model, batches):
            part = model(x, y) / len(batches)
            part.backward()
            parts.append(part.detach())
        total = torch.stack(parts).sum()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    return step


def train(model: nn.Module, batches: list[list[Batch]], step: Step, name: str) -> Run:
    # Not Adam, which does not notice that all gradients are too large by the same factor.
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    losses, start = [], time.perf_counter()
    for number, micro_batches in enumerate(batches, 1):
        losses.append(step(model, micro_batches))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (number % 30 == 0 or number == len(batches)):
            progress = f"step {number} of {len(batches)}, {time.perf_counter() - start:.0f} s"
            print(f"{name}: {progress}, loss {losses[-1]:.4f}", flush=True)
    return Run(torch.stack(losses).double().cpu(), [whole(p) for p in model.parameters()])


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, in float64."""
    tensor = parameter.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.double().cpu()


# The comparison


class Comparison(NamedTuple):
    name: str
    together: Run
    naive: Run
    alone: Run
    bound: float

    def agrees(self) -> bool:
        return difference(self.together, self.alone) <= self.bound

    def text(self) -> str:
        found, naive = (difference(run, self.alone) for run in (self.together, self.naive))
        final = [f"{run.losses[-1]:.4f}" for run in (self.together, self.alone, self.naive)]
        verdict = "within" if self.agrees() else "MORE THAN"
        return (
            f"{self.name}: final loss {final[0]}, one process {final[1]}, "
            f"mean of means {final[2]}\n"
            f"{self.name}: differs from one process by {found:.1e}, {verdict} {self.bound:.1e}; "
            f"mean of means by {naive:.1e}"
        )


def difference(run: Run, other: Run) -> float:
    """The largest difference of a loss or weight, relative to the largest in its tensor."""
    pairs = zip([run.losses, *run.weights], [other.losses, *other.weights], strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def plot(path: Path, found: list[Comparison]) -> None:
    """A column for each comparison: the losses, and how far they are from those of one process."""
    from matplotlib.figure import Figure  # optional

    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure = Figure((max(6, 3.4 * columns), 5 * rows), layout="constrained")
    panels = figure.subplots(2 * rows, columns, sharex=True, squeeze=False)
    for number, each in enumerate(found):
        row, column = divmod(number, columns)
        losses, differences = panels[2 * row : 2 * row + 2, column]
        losses.set_title(each.name)
        losses.plot(each.alone.losses, color="#c9d1d9", lw=5, label="one process")
        differences.set(xlabel="step", yscale="log")
        for run, color, label in (
            (each.together, "#1f6fb2", "several processes"),
            (each.naive, "#d1622b", "mean of means"),
        ):
            losses.plot(run.losses, color=color, label=label)
            relative = (run.losses / each.alone.losses - 1).abs()
            differences.plot(relative.clamp(min=NONE), ".", color=color)
        if column == 0:
            losses.set_ylabel("loss, nats")
            differences.set_ylabel(f"relative difference\nfrom one process ({NONE}: none)")
    for unused in panels[-2:, len(found) - columns * (rows - 1) :].flat:
        unused.remove()
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
