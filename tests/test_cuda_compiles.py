"""Triton's kernels compile for GPUs, which needs no GPU; and the fallback without Triton."""

import re
import sys

import pytest
import torch
import triton
from triton.backends import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_sce import kernels
from torch_sce.kernels import aten, cuda, cuda_targets
from torch_sce.kernels.cuda import LONG, Tile

FLOATS = ("loss", "m_out", "r_out", "p_out", "s_out", "a_out", "m_parts", "r_parts",
          "g", "m", "r", "p", "s", "a")  # fmt: skip
POINTERS = {"y": "*i64", "counted": "*i1", **dict.fromkeys(FLOATS, "*fp32")}

# Some rows, a part of one, and a map, each with the steps that are 1 there.
TILES = {
    "rows": (Tile(64, 32, 1), {"step", "out", "t_step", "dz_step", "dt_step"}),
    "part of a row": (Tile(1, LONG, 1), {"step", "out", "t_step", "dz_step", "dt_step"}),
    "map": (Tile(64, 32, 0), {"step_2", "out_2", "t_2", "dz_2", "dt_2"}),
}


def compiled(kernel, dtype, tile, clip, ones, capability, targets="fp32", **options):
    """The kernel's PTX, as it is compiled where all other sizes and steps divide by 16.

    Else, with 1000 classes for example, Triton loads an element at a time.
    """
    constants = tile.options(clip) | options
    launch = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    constants |= dict.fromkeys(ones & set(kernel.arg_names), 1)
    signature, divisible = {}, []
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "i32")
        if name in ("z", "dz"):
            signature[name] = f"*{dtype}"
        if name in ("t", "dt"):
            signature[name] = f"*{targets}"
        if name in ("low", "high", "keep", "added"):
            signature[name] = "fp32"
        else:
            divisible.append(at)
    source = ASTSource(kernel, *as_triton_reads(signature, divisible, constants))
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch).asm["ptx"]


def as_triton_reads(signature, divisible, constants):
    """The signature, constants and attributes of a kernel, which differ in Triton 3.2."""
    before = getattr(compiler, "AttrsDescriptor", None)
    if before is None:
        return signature, constants, {(at,): [["tt.divisibility", 16]] for at in divisible}
    signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    return signature, constants, before.from_hints(dict.fromkeys(divisible, 16))


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "bf16"), (90, "fp32")])
@pytest.mark.parametrize("clip", [None, (1e-7, 1.0)], ids=["logits", "probabilities"])
@pytest.mark.parametrize("tile", TILES)
def test_every_kernel_compiles(tile, clip, capability, dtype):
    shape, ones = TILES[tile]
    given = (dtype, shape, clip, ones, capability)
    for flag in (False, True):
        forward = compiled(cuda._forward, *given, SPLIT=flag)
        backward = compiled(cuda._backward, *given, SAME=flag)
        if tile == "part of a row":  # 16 bytes at a time, and the predictions once
            assert _vectors_in(forward, "ld") == _vectors(dtype)
            assert _vectors_in(backward, "ld") == _vectors(dtype)
            assert _vectors_in(backward, "st") == _vectors(dtype)
    merging = Tile(1, 16, 1)
    assert compiled(cuda._merge, dtype, merging, clip, {"step"}, capability)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp16"), (90, "bf16"), (90, "fp32")])
@pytest.mark.parametrize("clip", [None, (1e-7, 1.0)], ids=["logits", "probabilities"])
@pytest.mark.parametrize("tile", TILES)
def test_every_kernel_of_targets_compiles(tile, clip, capability, dtype):
    shape, ones = TILES[tile]
    given = (dtype, shape, clip, ones, capability, dtype)
    part = tile == "part of a row"
    for absent in ({}, {"dz": None}, {"dt": None, "counted": None}):
        options = {"SAME": not absent, "LABELS": False, **absent}
        backward = compiled(cuda_targets._backward, *given, **options)
        if part:  # targets are not read for a gradient of their own alone
            assert _vectors_in(backward, "ld") == (1 if "dz" in absent else 2) * _vectors(dtype)
            assert _vectors_in(backward, "st") == (1 if absent else 2) * _vectors(dtype)
    forward = compiled(cuda_targets._forward, *given, LABELS=False)
    # An inexact quotient could be on the other side of a bound.
    assert ("div.rn" in forward) == ("div.rn" in backward) == (clip is not None)
    if part:  # probabilities are read twice
        assert _vectors_in(forward, "ld") == (2 if clip is None else 3) * _vectors(dtype)


@pytest.mark.parametrize("targets", ["i1", "u8", "i64", "fp16", "fp64"])
def test_targets_of_every_dtype_compile(targets):
    shape, ones = TILES["rows"]
    for clip in (None, (1e-7, 1.0)):
        given = ("bf16", shape, clip, ones, 80, targets)
        options = {"LABELS": False, "counted": None}
        assert compiled(cuda_targets._forward, *given, **options)
        absent = {} if targets.startswith("fp") else {"dt": None}
        assert compiled(cuda_targets._backward, *given, SAME=False, LABELS=False, **absent)


@pytest.mark.parametrize("clip", [None, (1e-7, 1.0)], ids=["logits", "probabilities"])
@pytest.mark.parametrize("tile", TILES)
def test_kernels_of_smoothed_labels_compile(tile, clip):
    shape, ones = TILES[tile]
    given = ("bf16", shape, clip, ones, 90, "i64")
    for counted in ({}, {"counted": None}):
        forward = compiled(cuda_targets._forward, *given, LABELS=True, **counted)
        options = {"SAME": False, "LABELS": True, "dt": None, **counted}
        backward = compiled(cuda_targets._backward, *given, **options)
    if tile == "part of a row":  # nothing is read but the predictions
        assert _vectors_in(forward, "ld") == (1 if clip is None else 2) * _vectors("bf16")
        assert _vectors_in(backward, "ld") == _vectors("bf16")


def _vectors_in(ptx, operation):
    """How many instructions move 16 bytes."""
    return len(re.findall(rf"{operation}\.global\S*\.v[24]", ptx))


def _vectors(dtype):
    """How many 16 bytes each of a program's 256 threads has of a tile."""
    return LONG * (4 if dtype == "fp32" else 2) // (256 * 16)


def test_without_triton_or_on_an_old_gpu_any_device_s_path_is_taken(monkeypatch):
    device, capability = torch.device("cuda", 0), [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    choose = kernels._cuda_kernels.__wrapped__
    assert choose(device) is cuda
    capability[0] = 7
    assert choose(device) is aten
    capability[0] = 9
    monkeypatch.setitem(sys.modules, "torch_sce.kernels.cuda", None)
    monkeypatch.delattr(kernels, "cuda")
    assert choose(device) is aten
