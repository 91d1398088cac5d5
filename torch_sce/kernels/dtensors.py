"""Losses of a `DTensor`, whose rows are spread over the ranks of a device mesh.

    z (..., C)   a DTensor; each rank computes the rows that it has
    y (...)      and `counted`: DTensors, which are brought to where their rows are

Along one axis of the mesh the classes may be divided, too: its ranks exchange summaries (`shards`).
What is divided in other ways is gathered, and summands are added up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import are_plain, aten, kernels_for, target_kernels, targets
from .contract import Clip, Kernels, Saved, TargetKernels
from .shards import Slice, SliceKernels


class Labels(NamedTuple):
    """Kernels for rows that are `placed`, as `contract.Kernels` has them."""

    shard: Slice | None

    def forward(self, z: Any, y: Any, counted: Any, clip: Clip) -> tuple[Tensor, Saved]:
        mine = _parts(z, y, counted)
        loss, saved = self._kernels(*mine).forward(*mine, clip)
        return losses_of(loss, z), saved

    def backward(self, g: Any, z: Any, y: Any, counted: Any, clip: Clip, saved: Saved) -> Tensor:
        g, mine = part_of_rows(g, z), _parts(z, y, counted)
        return _whole(self._kernels(*mine).backward(g, *mine, clip, saved), z)

    def _kernels(self, z: Tensor, y: Tensor, counted: Tensor | None) -> Kernels | SliceKernels:
        kernels = kernels_for(z) if are_plain(z, y, counted) else aten  # for modes
        return kernels if self.shard is None else SliceKernels(kernels, self.shard)


class Targets:
    """The same for rows with a target for every class, as `contract.TargetKernels` has them."""

    @staticmethod
    def forward(z: Any, t: Any, counted: Any, clip: Clip, smoothing: float) -> tuple[Tensor, Saved]:
        mine = _parts(z, t, counted)
        loss, saved = _target_kernels(*mine).forward(*mine, clip, smoothing)
        return losses_of(loss, z), saved

    @staticmethod
    def backward(
        g: Any, z: Any, t: Any, counted: Any, clip: Clip, smoothing: float,
        needs: tuple[bool, bool], saved: Saved,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        g, mine = part_of_rows(g, z), _parts(z, t, counted)
        dz, dt = _target_kernels(*mine).backward(g, *mine, clip, smoothing, needs, saved)
        return None if dz is None else _whole(dz, z), None if dt is None else _whole(dt, t)


def _target_kernels(z: Tensor, t: Tensor, counted: Tensor | None) -> TargetKernels:
    return target_kernels(z, t) if are_plain(z, t, counted) else targets


def placed(z: Any, y: Any, counted: Any, divides_classes: bool = False) -> tuple[Any, Any, Any]:
    """Predictions with whole rows, or slices of them, and the others where these are."""
    z = whole_rows(z, divides_classes)
    rows = _of_rows(z)
    return z, _moved(y, rows), None if counted is None else _moved(counted, rows)


def whole_rows(z: Any, divides_classes: bool = False) -> Tensor:
    """z with its classes gathered, or divided along one axis of the mesh at most."""
    rows, last = _of_rows(z), z.ndim - 1
    axis = _axis_of_classes(z, last, rows) if divides_classes else None
    return _moved(z, _divided(rows, axis, last))


def classes_of(z: Any) -> Slice | None:
    """Which this rank has of z from `whole_rows`; None: all."""
    return _slice(z, z.ndim - 1, _axis_of_classes(z, z.ndim - 1, _of_rows(z)))


def with_rows_for(weight: Any, hidden: Any) -> Any:
    """`hidden`, its rows gathered along an axis of the mesh that divides a larger weight, too."""
    rows = _of_rows(hidden)
    for axis, (own, row) in enumerate(zip(weight.placements, rows, strict=True)):
        if own.is_shard(0) and row.is_shard() and hidden.numel() < weight.numel():
            return _moved(hidden, [*rows[:axis], Replicate(), *rows[axis + 1 :]])
    return hidden


def head_of_rank(
    hidden: Any, weight: Any, bias: Any, divides_classes: bool
) -> tuple[Tensor, Tensor, Tensor | None, Slice | None]:
    """This rank's part of a linear head (see `head`), and which classes it has; None: all.

    Rows stay where they are, and if `divides_classes` so do classes along one axis of the mesh that
    has no rows. Along an axis with rows each rank has a summand of the weight's gradient.
    """
    rows = _of_rows(hidden)
    axis = _axis_of_classes(weight, 0, rows) if divides_classes else None
    classes = _divided([Replicate() for _ in rows], axis, 0)
    gradients = [
        p if row.is_replicate() else Partial() for p, row in zip(classes, rows, strict=True)
    ]
    return (
        part_of(_moved(hidden, rows), rows),
        part_of(_moved(weight, classes), gradients),
        None if bias is None else part_of(_moved(bias, classes), gradients),
        _slice(weight, 0, axis),
    )


def part_of(x: Any, gradient: Sequence[Placement] | None = None) -> Tensor:
    """This rank's part. Its gradient has these placements, or those of x."""
    part = x.to_local(grad_placements=gradient)
    if part.ndim < x.ndim:  # (0,), on a rank that the mesh does not have
        part = part.reshape(0, *x.shape[1:])
    return part.clone() if hasattr(part, "wait") else part  # one that is still being sent


def part_of_rows(x: Any, like: Any) -> Tensor:
    """This rank's part of what has one number for each row of `like`."""
    return part_of(_moved(x, _of_rows(like)))


def losses_of(part: Tensor, z: Any) -> Tensor:
    """The losses of z's rows, of which this rank has a part."""
    shape = z.shape[:-1]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, z.device_mesh, _of_rows(z), shape=shape, stride=stride)


def _whole(part: Tensor, like: Any) -> Tensor:
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride)


def _parts(z: Any, y: Any, counted: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return part_of(z), part_of(y), None if counted is None else part_of(counted)


def _moved(x: Any, placements: Sequence[Placement]) -> Any:
    return x.redistribute(placements=placements)


def _of_rows(x: Any) -> list[Placement]:
    """The placements of what has one number for each row."""
    return [p if type(p) is Shard and p.dim < x.ndim - 1 else Replicate() for p in x.placements]


def _axis_of_classes(x: Any, dim: int, rows: Sequence[Placement]) -> int | None:
    """Along which axis of the mesh x has the classes divided, its axis `dim`, where no rows are."""
    for axis, (placement, row) in enumerate(zip(x.placements, rows, strict=True)):
        if type(placement) is Shard and placement.dim == dim and row.is_replicate():
            return axis
    return None


def _divided(placements: Sequence[Placement], axis: int | None, dim: int) -> list[Placement]:
    """The same, with `dim` divided along an axis of the mesh."""
    return [Shard(dim) if number == axis else p for number, p in enumerate(placements)]


def _slice(x: Any, dim: int, axis: int | None) -> Slice | None:
    """Which classes this rank has, if x has them divided along an axis of the mesh."""
    mesh, classes = x.device_mesh, x.shape[dim]
    if axis is None or mesh.get_coordinate() is None:  # without it, this rank has no part
        return None
    largest = -(-classes // mesh.size(axis))  # as torch.chunk divides them
    start = min(mesh.get_local_rank(axis) * largest, classes)
    return Slice(mesh.get_group(axis), min(largest, classes - start), start, classes, largest)
