"""The loss of a linear head: against the loss of all its logits in float64, and PyTorch's features.

N rows, H features, C classes;  z = hidden @ weight.T + bias
"""

import copy
import pickle
from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from paths import PATHS, take_path
from torch import Tensor, library, nn

from torch_sce import (
    LinearSparseCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    linear_sparse_categorical_crossentropy,
    sparse_categorical_crossentropy,
)
from torch_sce import linear as linear_module
from torch_sce.kernels import head

ON_CPU = pytest.mark.skipif("torch.get_default_device().type != 'cpu'")
COMPILES = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="operators are used from PyTorch 2.7 on"
)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "none")
GIVEN = ("hidden", "weight", "bias", "sample_weight")  # what has a gradient


@dataclass
class Problem:
    """A call of the loss, and what its value's gradient is taken against."""

    y: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Any = None  # a tensor, as the two below, if there is one
    sample_weight: Any = None
    mask: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    upstream: Tensor | float = 1.0

    def loss(self, **others: Any) -> LinearSparseCategoricalCrossentropy:
        return LinearSparseCategoricalCrossentropy(**self.options | others)

    def option(self, name: str) -> Any:
        return getattr(self.loss(), name)

    def counted(self) -> Tensor:
        """Which positions count, for the oracle."""
        kept = self.y != self.options.get("ignore_class", torch.nan)
        return kept if self.mask is None else kept & (self.mask != 0).expand(kept.shape)


def problem(
    shape=(11,), features=7, classes=13, dtype=torch.float32, *, bias=False, weighted=False,
    masked=False, ignored=False, seed=0, **options,
):  # fmt: skip
    """Logits of a deviation of 1.5, and an upstream gradient: one number, or one for each loss."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    y = torch.randint(0, classes, shape, generator=generator)
    if ignored:
        y[torch.rand(shape, generator=generator) < 0.3] = -1
        options["ignore_class"] = -1
    is_unreduced = options.get("reduction") in ("none", None) and "reduction" in options
    if dtype == torch.float64:
        options.setdefault("dtype", "float64")
    return Problem(
        y,
        normal(*shape, features).to(dtype),
        (normal(classes, features) * 1.5 / features**0.5).to(dtype),
        normal(classes).to(dtype) if bias else None,
        torch.rand(shape, generator=generator) + 0.5 if weighted else None,
        torch.rand(shape, generator=generator) < 0.7 if masked else None,
        options,
        normal(*shape) if is_unreduced else 0.7,
    )


@dataclass
class Results:
    """The value and the gradients, or how far each may be off; None where there is none."""

    value: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    sample_weight: Tensor | None = None


def leaves(p: Problem, needs=GIVEN) -> Problem:
    """The same call of leaves that need a gradient, with the strides that they have."""
    given = {name: getattr(p, name) for name in GIVEN}
    return replace(
        p, **{name: None if x is None else x.detach().requires_grad_(name in needs)
              for name, x in given.items()},
    )  # fmt: skip


def results(p: Problem, needs=GIVEN, call=None) -> Results:
    """By the loss that is tested, or another `call` with its arguments."""
    q = leaves(p, needs)
    call = p.loss() if call is None else call
    value = call(q.y, q.hidden, q.weight, q.bias, q.sample_weight, q.mask)
    wanted = {name: x for name in needs if (x := getattr(q, name)) is not None}
    found = (
        torch.autograd.grad((value * p.upstream).sum(), tuple(wanted.values())) if wanted else ()
    )
    return Results(value.detach(), **dict(zip(wanted, found, strict=True)))


def compute_dtype(p: Problem) -> torch.dtype:
    device = p.hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else p.hidden.dtype


def exact(p: Problem) -> tuple[Results, Results]:
    """By the loss of all logits in float64, of inputs as the products have them; and its bounds.

    `allowed` says how the bounds are derived.
    """
    compute = compute_dtype(p)
    with torch.autocast(p.hidden.device.type, enabled=False):
        return _exact(p, compute)


def _exact(p: Problem, compute: torch.dtype) -> tuple[Results, Results]:
    x = torch.where(p.counted().unsqueeze(-1), p.hidden.detach(), 0)  # NaNs there do not matter
    x, w = x.to(compute).double().requires_grad_(), p.weight.to(compute).double().requires_grad_()
    b = w.new_zeros(len(w)) if p.bias is None else p.bias.to(compute).double()
    v = None if p.sample_weight is None else p.sample_weight.double().requires_grad_()
    b.requires_grad_()
    z, cap = x @ w.T + b, p.option("logit_softcap")
    seen = z if cap is None else cap * (z / cap).tanh()
    options = {key: x for key, x in p.options.items() if key in ("ignore_class", "reduction")}
    loss = SparseCategoricalCrossentropy(from_logits=True, **options, dtype="float64")
    value = loss(p.y, seen, v, p.mask)
    losses = SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=p.option("ignore_class"), reduction="none", dtype="float64"
    )(p.y, seen, mask=p.mask)
    total = (value * p.upstream).sum()
    wanted = [x, w, b, *([] if v is None else [v]), z, seen]
    dx, dw, db, *dv, dz, dseen = torch.autograd.grad(total, wanted)
    want = Results(value.detach(), dx, dw, None if p.bias is None else db, dv[0] if dv else None)
    rows = [each.detach().reshape(p.y.numel(), each.shape[-1]) for each in (x, z, dz, dseen)]
    return want, allowed(p, compute, want, w.detach(), b.detach(), losses.detach().flatten(), *rows)


def allowed(p, compute, want, w, b, losses, x, z, dz, dseen) -> Results:
    """How far value and gradients may be off: a rounding for each operation on their way.

    u is a rounding of the dtype that rows and sums are computed in, `rounding` one of the products'
    dtype. A sum of k terms in any order is off by k u of their sizes' sum. Then to first order:

        logits        (H + 2) u |x| |w|, twice a `rounding` for halves, and one more for a loss
                      in a narrower dtype; a softcap has three operations, each off by 2 u
        loss          twice what its row's logits are off; its sum of C exponentials, which are off
                      by their arguments' roundings; a logarithm and two sums
        dz            relative: the same; its factor g of the upstream gradient, with a sum over
                      the rows; it is rounded when it is stored and when a product reads it
        slope         of a softcap, 1 - t^2: absolute, twice what t is off
        products      what dz is off; their sums; a `rounding` for each chunk's part, however many
                      there are; of the result, and of its product with the upstream gradient
    """
    u, rounding = unit(head.real_dtype(compute)), unit(compute)
    (C, H), N, cap = w.shape, len(losses), p.option("logit_softcap")
    dtype = p.option("dtype")
    kernels_dtype = torch.float64 if dtype == compute == torch.float64 else torch.float32
    u_row = max(unit(kernels_dtype), u)
    stored = max(rounding, unit(dtype))
    size = x.abs() @ w.abs().T + b.abs()
    off = size * ((H + 2) * u + 2 * (rounding if compute in HALVES else 0))
    off = off + (size * unit(dtype) if dtype != compute and unit(dtype) > rounding else 0)
    seen = z
    if cap is not None:
        off, seen = off + 6 * u_row * size, cap * (z / cap).tanh()
    e = off.amax(-1)
    spread = 2 * seen.abs().amax(-1)
    sums = u_row * (C + 2 * (3 + spread))
    each = 2 * e + sums + u_row * (spread + 2 * torch.tensor(C).log() + 3)
    relative = (torch.expm1(2 * e + sums + u_row * (N + 12)) + 3 * stored).unsqueeze(-1)
    if cap is None:
        slope = slope_off = torch.zeros(())
        dz_off = dz.abs() * relative
    else:
        t = seen / cap
        slope, slope_off = 1 - t * t, 2 * (off / cap + u_row) + 4 * u_row
        dz_off = dseen.abs() * (slope * relative + slope_off)
    dz_off = torch.where(p.counted().reshape(N, 1), dz_off + least(compute) + least(dtype), 0)
    dz, x, factor = dz.abs(), x.abs(), factors(p)
    once = 3 * (rounding if compute in HALVES else u)
    value = factor * (each + (N + 8) * u_row * losses)
    is_unreduced = p.option("reduction") in ("none", None)
    value = value.reshape(p.y.shape) if is_unreduced else value.sum()
    value = value + unit(dtype) * want.value.abs() + least(dtype)
    upstream = abs(p.upstream) if isinstance(p.upstream, float) else p.upstream.abs()

    def product(off, a, b, k, result, like):
        sum_off = (k * u + once) * (a @ b) + off @ b
        return (
            sum_off.reshape(result.shape) + 2 * unit(like.dtype) * result.abs() + least(like.dtype)
        )

    bounds = Results(
        value,
        product(dz_off, dz, w.abs(), C + 2, want.hidden, p.hidden),
        product(dz_off.T, dz.T, x, N + 2, want.weight, p.weight),
    )
    if want.bias is not None:
        ones = dz.new_ones(len(dz), 1)
        bounds.bias = product(dz_off.T, dz.T, ones, N + 2, want.bias, p.bias)
    if want.sample_weight is not None:
        # The loss, for a weighted mean less that mean, over the divisor.
        is_mean = p.option("reduction") == "mean_with_sample_weight"
        mean, mean_off = (want.value.abs(), value) if is_mean else (0.0, 0.0)
        off = each + mean_off + (N + 8) * u_row * (losses + mean)
        per_weight = (factor * off).reshape(p.y.shape) / p.sample_weight.double()
        roundings = 2 * unit(p.sample_weight.dtype) * want.sample_weight.abs()
        bounds.sample_weight = upstream * per_weight + roundings
    return bounds


def factors(p: Problem) -> Tensor:
    """What each loss is multiplied by in the value, by the table of `reduction`; weights > 0."""
    v = p.counted().double()
    w = v if p.sample_weight is None else p.sample_weight.double() * v
    reduction = p.option("reduction")
    if reduction in ("none", None, "sum"):
        return w.flatten()
    weights = w if reduction == "mean_with_sample_weight" else v
    return (w / weights.sum().clamp(min=1e-30)).flatten()


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of a rounding."""
    return torch.finfo(dtype).eps / 2


def least(dtype: torch.dtype) -> float:
    """The largest absolute error of a rounding of a number near 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def require_right(p: Problem, found: Results | None = None) -> None:
    found = results(p) if found is None else found
    want, within = exact(p)
    assert found.value.dtype == p.option("dtype")
    for name, value in vars(found).items():
        if value is None:
            continue
        right, bound = getattr(want, name), getattr(within, name)
        if name != "value":
            given = getattr(p, name)
            assert value.dtype == given.dtype and value.shape == given.shape, name
        wrong = ~((value.double() - right).abs() <= bound)
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} are off by up to "
            f"{float(((value.double() - right).abs() / bound).nan_to_num(torch.inf).max())} bounds"
        )


CASES = {
    "plain": {},
    "everything": {"bias": True, "weighted": True, "masked": True, "ignored": True},
    "ignored": {"ignored": True, "bias": True},
    "mask": {"masked": True},
    "softcap": {"logit_softcap": 2.0, "bias": True},
    "softcap, ignored, weighted": {"logit_softcap": 3, "ignored": True, "weighted": True},
    "sequences": {"shape": (3, 5), "ignored": True, "weighted": True},
    "one row": {"shape": (), "bias": True},
    "a batch of one": {"shape": (1,), "weighted": True},
    "no rows": {"shape": (0,), "bias": True},
    "one class": {"classes": 1, "bias": True},
    "one feature": {"features": 1},
    "many classes": {"classes": 200, "features": 33, "shape": (40,)},
}


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    if "compile" in request.node.name:
        torch._dynamo.reset()


def small_chunks(monkeypatch, rows):
    """So many rows to a chunk; None: as `chunk_bytes` says."""
    if rows is not None:
        monkeypatch.setattr(head, "_chunk_rows", lambda head: rows)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_all_logits_in_float64(case, dtype, rows, monkeypatch):
    """In one chunk, and in several of which the last one may be smaller."""
    small_chunks(monkeypatch, rows)
    for reduction in REDUCTIONS:
        require_right(problem(dtype=dtype, reduction=reduction, **CASES[case]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", [*PATHS, "rows are not left out"])
def test_every_path_has_the_same_value_and_gradients(path, dtype, monkeypatch):
    """That of a GPU, too: rows that do not count are not left out but taken as 0."""
    if path in PATHS:
        take_path(path, monkeypatch)
    if path != "cpu":
        monkeypatch.setattr(head, "_leaves_rows_out", lambda x: False)
    small_chunks(monkeypatch, 4)
    for case, reduction in product(("everything", "softcap, ignored, weighted"), REDUCTIONS):
        p = problem(dtype=dtype, reduction=reduction, **CASES[case])
        p.hidden[~p.counted()] = torch.nan
        require_right(p)


LAYOUTS = {
    "the kernel of Keras": ("weight", lambda w: w.t().contiguous().t()),
    "a weight with gaps": ("weight", lambda w: F.pad(w, (0, 3))[:, :-3]),
    "every other class": ("weight", lambda w: w.repeat_interleave(2, 0)[::2]),
    "transposed rows": ("hidden", lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1)),
    "all but the last": ("hidden", lambda x: F.pad(x, (0, 0, 0, 1))[:, :-1]),
    "batch second": ("hidden", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "the same for all": ("hidden", lambda x: x[:1, :1].expand_as(x)),
    "bias with gaps": ("bias", lambda b: b.repeat_interleave(2)[::2]),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_lie_anywhere_in_memory(layout, reduction, monkeypatch):
    small_chunks(monkeypatch, 4)
    name, change = LAYOUTS[layout]
    for dtype, ignored in product((torch.float32, torch.bfloat16), (False, True)):
        p = problem((3, 5), dtype=dtype, bias=True, ignored=ignored, reduction=reduction)
        setattr(p, name, change(getattr(p, name)))
        require_right(p)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize("given", DTYPES, ids=str)
def test_the_loss_has_a_dtype_of_its_own(given, dtype, monkeypatch):
    """Of inputs in float16 the unreduced path, of a loss in float16 too."""
    small_chunks(monkeypatch, 4)
    for case in ("everything", "softcap"):
        p = problem(dtype=given, **CASES[case])
        p.options["dtype"] = dtype
        require_right(p)


@pytest.mark.parametrize("chunk_bytes", [1, 400, 2**20, None])
def test_chunk_bytes_change_nothing_but_roundings(chunk_bytes):
    """One row, a few rows, and one chunk."""
    for reduction in ("mean", "none"):
        p = problem((50,), reduction=reduction, chunk_bytes=chunk_bytes, **CASES["everything"])
        require_right(p)


def test_a_chunk_has_the_rows_that_fit(monkeypatch):
    seen = []
    right = head._seen
    monkeypatch.setattr(head, "_seen", lambda w, head: seen.append(len(w.z)) or right(w, head))
    p = problem((50,), features=7, classes=13)
    for rows in (1, 4, 25, 49, 50, 1000):
        seen.clear()
        p.loss(chunk_bytes=4 * 13 * rows)(p.y, p.hidden, p.weight)
        assert sum(seen) == 50 and max(seen) <= rows and max(seen) - min(seen) < 50 / len(seen)
        assert len(seen) == -(-50 // rows)


def test_the_function_has_the_unreduced_losses():
    for dtype in DTYPES:
        p = problem((3, 5), dtype=dtype, bias=True, ignored=True, reduction="none")
        p.options["dtype"] = "float64" if dtype == torch.float64 else None

        def call(y, hidden, weight, bias, *rest):
            return linear_sparse_categorical_crossentropy(
                y, hidden, weight, bias, ignore_class=-1, chunk_bytes=500
            )

        require_right(p, results(p, call=call))
        capped = linear_sparse_categorical_crossentropy(
            p.y, p.hidden, p.weight, ignore_class=-1, logit_softcap=2
        )
        loss = p.loss(logit_softcap=2.0)
        assert torch.equal(capped, loss(p.y, p.hidden, p.weight))


def test_lists_are_taken_as_hidden_s_dtype():
    p = problem((2,), features=3, classes=4)
    lists = [x.tolist() for x in (p.y, p.hidden, p.weight)]
    assert torch.equal(p.loss()(*lists), p.loss()(p.y, p.hidden, p.weight))
    assert p.loss()(p.y, p.hidden.double(), p.weight.tolist()).isfinite()


# Which gradients are needed


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_of_the_gradients_may_be_needed(reduction, monkeypatch):
    small_chunks(monkeypatch, 4)
    p = problem(bias=True, weighted=True, reduction=reduction)
    whole = results(p)
    for chosen in product((False, True), repeat=4):
        needs = [name for name, need in zip(GIVEN, chosen, strict=True) if need]
        found = results(p, needs)
        require_right(p, found)
        for name in GIVEN:
            got, want = getattr(found, name), getattr(whole, name)
            assert got is None if name not in needs else got.shape == want.shape


def refuse(*_args, **_kwargs):
    raise AssertionError("this is not to be computed")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_that_are_not_needed_are_not_computed(reduction, monkeypatch):
    p = problem(bias=True, reduction=reduction)
    monkeypatch.setattr(head._SumOfProducts, "add", refuse)
    require_right(p, results(p, ("hidden", "bias")))
    kernels = SimpleNamespace(forward=head.kernels_for(p.hidden).forward, backward=refuse)
    monkeypatch.setattr(head, "kernels_for", lambda z: kernels)
    require_right(p, results(p, ()))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            q = leaves(p)
            value = p.loss()(q.y, q.hidden, q.weight, q.bias)
        assert not value.requires_grad
        assert torch.equal(value, p.loss()(p.y, p.hidden, p.weight, p.bias))


def test_logits_are_computed_once_if_the_gradients_are_known_and_else_twice(monkeypatch):
    passes = []
    right = head._chunks
    monkeypatch.setattr(head, "_chunks", lambda head: passes.append(1) or right(head))
    for given, needs, options, count in (
        (torch.float32, GIVEN[:3], {}, 1),
        (torch.bfloat16, GIVEN[:3], {}, 1),
        (torch.float16, GIVEN[:3], {}, 2),
        (torch.float32, GIVEN[:3], {"dtype": "float16"}, 2),
        (torch.float32, GIVEN, {}, 2),
        (torch.float32, GIVEN[:3], {"reduction": "none"}, 2),
        (torch.float32, GIVEN[3:], {}, 1),
    ):
        p = problem(dtype=given, bias=True, weighted=True)
        passes.clear()
        results(replace(p, options=options), needs)
        assert len(passes) == count, (given, needs, options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_mask_may_have_a_gradient(reduction):
    p = problem(reduction=reduction)
    for needs in ((), GIVEN):
        q, mask = leaves(p, needs), torch.rand(11).requires_grad_()
        value = p.loss()(q.y, q.hidden, q.weight, mask=mask).sum()
        (found,) = torch.autograd.grad(value, mask)
        torch.testing.assert_close(found, p.loss(reduction="none")(p.y, p.hidden, p.weight))


# What belongs to the caller


def require_inputs_unchanged(p: Problem) -> None:
    given = {name: x for name, x in vars(p).items() if isinstance(x, Tensor)}
    before = {name: (x.clone(), x._version) for name, x in given.items()}
    results(p)
    for name, x in given.items():
        assert torch.equal(x, before[name][0]) and x._version == before[name][1], name


@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_the_caller_s_is_written_to(dtype, chunk_bytes):
    for case, reduction, cap in product(("plain", "everything"), ("mean", "none"), (None, 2.0)):
        options = {"logit_softcap": cap, "chunk_bytes": chunk_bytes}
        require_inputs_unchanged(
            problem(dtype=dtype, reduction=reduction, **CASES[case], **options)
        )


@pytest.mark.parametrize("leaves_rows_out", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_ignored_positions_may_hold_anything(bad, leaves_rows_out, monkeypatch):
    monkeypatch.setattr(head, "_leaves_rows_out", lambda x: leaves_rows_out)
    small_chunks(monkeypatch, 4)
    for dtype, reduction in product(DTYPES, REDUCTIONS):
        p = problem(dtype=dtype, reduction=reduction, **CASES["everything"])
        clean = results(p)
        p.hidden[~p.counted()] = bad
        found = results(p)
        assert found.hidden is not None and (found.hidden[~p.counted()] == 0).all()
        for name, value in vars(found).items():
            assert torch.equal(value, getattr(clean, name)), name


@pytest.mark.parametrize("leaves_rows_out", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_that_counts_gives_zeros(reduction, leaves_rows_out, monkeypatch):
    monkeypatch.setattr(head, "_leaves_rows_out", lambda x: leaves_rows_out)
    for dtype in DTYPES:
        p = problem(dtype=dtype, bias=True, weighted=True, reduction=reduction)
        p.options["ignore_class"], p.hidden[:] = -1, torch.nan
        p.y[:] = -1
        assert all((x == 0).all() for x in vars(results(p)).values() if x is not None)


# Backward passes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_needs_the_graph(reduction):
    q = leaves(problem(bias=True, reduction=reduction))
    value = q.loss()(q.y, q.hidden, q.weight, q.bias).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        value.backward()


@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_retained_gives_the_same_gradients_again(reduction, upstream):
    """Whatever becomes of those from before: they are added to, and set to zero."""
    q = leaves(problem((3, 5), bias=True, reduction=reduction))
    value = q.loss()(q.y, q.hidden, q.weight, q.bias).sum() * upstream
    first = torch.autograd.grad(value, (q.hidden, q.weight, q.bias), retain_graph=True)
    first = [x.clone() for x in first]
    for times in (1, 2, 4):  # 3 would round
        for _ in range(times - times // 2):
            value.backward(retain_graph=True)
        for name, want in zip(GIVEN, first, strict=False):
            assert torch.equal(getattr(q, name).grad, times * want), (name, times)
    for name in GIVEN[:3]:
        getattr(q, name).grad.zero_()
    value.backward()
    for name, want in zip(GIVEN, first, strict=False):
        assert torch.equal(getattr(q, name).grad, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_cannot_be_differentiated_again(reduction):
    q = leaves(problem(reduction=reduction))
    value = q.loss()(q.y, q.hidden, q.weight).sum()
    with pytest.raises(
        RuntimeError, match=r"differentiated twice .*SparseCategoricalCross.* of hid"
    ):
        torch.autograd.grad(value, q.hidden, create_graph=True)


@pytest.mark.parametrize("factor", [0.25, 0.0, -3.0, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_upstream_gradient_is_a_factor(dtype, factor):
    for reduction in ("mean", "sum"):
        p = problem(dtype=dtype, reduction=reduction, **CASES["everything"])
        p.upstream = factor
        require_right(p)
        assert results(p, GIVEN[:3]).hidden is not None
        require_right(p, results(p, GIVEN[:3]))


def test_small_gradients_of_float16_survive_with_a_scaler():
    """Of a mean over 2^14 rows they are below float16's least number; a factor of 2^14 is exact."""
    p = problem((2**14,), features=4, classes=8, dtype=torch.float16, bias=True)
    p.upstream = 2.0**14
    p.weight[0] -= 8  # a class with probabilities near 2^-12
    p.hidden.abs_()
    found = results(p)
    require_right(p, found)
    p.upstream = 1.0
    lost = results(p)
    assert lost.hidden is not None and found.hidden is not None
    assert (lost.hidden == 0).any() and (found.hidden != 0).float().mean() > 0.99


def test_a_grad_scaler_steps_as_with_the_logits():
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(5, 4, dtype=torch.float16)
        x, y = torch.randn(6, 5).half(), torch.randint(0, 4, (6,))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        loss: Any = LinearSparseCategoricalCrossentropy()
        value = (
            loss(y, x, model.weight, model.bias)
            if fused
            else SparseCategoricalCrossentropy(from_logits=True)(y, model(x))
        )
        scaler.scale(value).backward()
        assert model.weight.grad is not None
        weights.append(model.weight.grad)
    # Logits and dz have the same bits or differ by a rounding of each; terms of a sum of 6, which
    # may cancel, are below 1024 / 6 times the largest entry of x.
    torch.testing.assert_close(*weights, rtol=2**-10, atol=3 * 2**-11 * 1024 * float(x.abs().max()))


def test_batches_of_upstream_gradients():
    for reduction in ("mean", "none"):
        p = problem(reduction=reduction)
        q = leaves(p)
        value = p.loss()(q.y, q.hidden, q.weight)
        g = torch.stack([torch.ones_like(value), torch.rand_like(value)])
        found = torch.autograd.grad(
            value, (q.hidden, q.weight), g, is_grads_batched=True, retain_graph=True
        )
        for number, each in enumerate(g):
            want = torch.autograd.grad(value, (q.hidden, q.weight), each, retain_graph=True)
            for got, right in zip(found, want, strict=True):
                torch.testing.assert_close(got[number], right)


# Sums over chunks


def integers(rows=1024) -> Problem:
    """In bfloat16, with logits that it holds exactly, so that each BLAS has the same ones.

    d weight of class 0, a label that is rare, is a sum of terms of the same sign.
    """
    p = problem((rows,), features=5, classes=6, dtype=torch.bfloat16, bias=True, reduction="sum")
    p.hidden, p.weight, p.bias = p.hidden.abs().ceil(), (2 * p.weight).round() / 4, p.bias.round()
    p.y[:] = 1 + p.y % 5
    return p


def require_no_growth(monkeypatch) -> None:
    """The same dz in 1, 16 and 256 chunks: what differs are the roundings of the sums.

    u is a rounding of bfloat16. For d weight each chunk's part is off by u of it, hence all of them
    by u of the sum of the terms' sizes, however many there are; the sum is float32; the result is
    off by u again. Two such results are apart by twice that. For d bias there are no parts.
    """
    p, u, found = integers(), unit(torch.bfloat16), []
    for chunks in (1, 16, 256):
        small_chunks(monkeypatch, 1024 // chunks)
        found.append(results(p))
    z = (p.hidden.double() @ p.weight.double().T + p.bias.double()).requires_grad_()
    loss = SparseCategoricalCrossentropy(from_logits=True, reduction="sum", dtype="float64")
    (dz,) = torch.autograd.grad(p.upstream * loss(p.y, z), z)
    sizes = dz.abs().T @ p.hidden.double().abs()
    for each in found[1:]:
        for name, parts in (("weight", sizes), ("bias", 0)):
            one, more = (getattr(x, name).double() for x in (found[0], each))
            within = 2 * u * (parts + one.abs()) + u * one.abs()  # the upstream gradient's product
            assert ((more - one).abs() <= within * (1 + 2 * u)).all(), name


def test_gradients_in_bfloat16_get_no_worse_with_more_chunks(monkeypatch):
    require_no_growth(monkeypatch)


def test_sums_in_bfloat16_would_get_worse(monkeypatch):
    def add(self, dz, x):
        self.chunks += 1
        self.part = head._as(self.result, self.compute) if self.part is None else self.part
        torch.addmm(self.part, dz.t(), x, beta=min(self.chunks - 1, 1), out=self.part)

    monkeypatch.setattr(head._SumOfProducts, "add", add)
    with pytest.raises(AssertionError, match="weight"):
        require_no_growth(monkeypatch)


def test_each_loss_is_the_same_for_any_number_of_chunks_if_its_logits_are(monkeypatch):
    """Small integers make products exact, so that no BLAS can round them in another way."""
    p = problem((256,), reduction="none")
    p.hidden, p.weight = p.hidden.round(), (4 * p.weight).round()
    found = []
    for chunks in (1, 16, 256):
        small_chunks(monkeypatch, 256 // chunks)
        found.append(results(p))
    assert all(torch.equal(each.value, found[0].value) for each in found)


# Autocast


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_does_as_with_a_linear_layer(dtype, reduction):
    """float32 parameters with float32 gradients; products in half precision."""
    device = torch.get_default_device().type
    for case in ("plain", "everything", "softcap"):
        p = problem(reduction=reduction, **CASES[case])
        with torch.autocast(device, dtype):
            require_right(p)
            want = SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=p.option("ignore_class"), reduction="none"
            )
            logits = F.linear(p.hidden, p.weight, p.bias)
            assert logits.dtype == dtype
            cap = p.option("logit_softcap")
            logits = logits if cap is None else cap * (logits.float() / cap).tanh()
            unfused = want(p.y, logits, p.sample_weight, p.mask)
            fused = p.loss(reduction="none")(
                p.y, p.hidden, p.weight, p.bias, p.sample_weight, p.mask
            )
        assert fused.dtype == unfused.dtype == torch.float32
        # Both within the bounds of the exact one, which is twice that.
        within = exact_within(replace(p, options=p.options | {"reduction": "none"}), dtype)
        assert ((fused - unfused).abs() <= 2 * within).all()


def exact_within(p: Problem, compute: torch.dtype) -> Tensor:
    return _exact(replace(p, upstream=torch.ones(p.y.shape)), compute)[1].value


def test_autocast_takes_tensors_of_several_dtypes_but_not_float64():
    p, device = problem(bias=True), torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        want = p.loss()(p.y, p.hidden, p.weight, p.bias)
        assert torch.equal(p.loss()(p.y, p.hidden.bfloat16(), p.weight, p.bias), want)
        assert torch.equal(p.loss()(p.y, p.hidden, p.weight.bfloat16(), p.bias.bfloat16()), want)
        for q in (replace(p, hidden=p.hidden.double()), replace(p, weight=p.weight.double())):
            with pytest.raises(TypeError, match=r"must have hidden's dtype.*all but float64"):
                q.loss()(q.y, q.hidden, q.weight, q.bias)
        whole = replace(p, hidden=p.hidden.double(), weight=p.weight.double(), bias=None)
        found = whole.loss(dtype="float64")(whole.y, whole.hidden, whole.weight)
    assert torch.equal(found, whole.loss(dtype="float64")(whole.y, whole.hidden, whole.weight))


# The compiler and transforms


def compiled(step, *, dynamic=None):
    """The compiled step, and the graphs that are made so far."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    return torch.compile(step, fullgraph=True, dynamic=dynamic, backend=look), graphs


@ON_CPU
@COMPILES
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_graphs_are_one_for_all_numbers_of_rows(reduction, dynamic):
    """The first call may be for its size alone; the second is for all."""
    options = {"reduction": reduction, "chunk_bytes": 500}
    loss = LinearSparseCategoricalCrossentropy(ignore_class=-1, **options)
    step, graphs = compiled(loss, dynamic=dynamic)
    for rows in (6, 9, 13, 40):
        p = problem((rows,), bias=True, ignored=True, weighted=True, **options)
        require_right(p, results(p, GIVEN[:3], step))
    assert len(graphs) == (1 if dynamic else 2)
    assert "torch_sce.head" in str(graphs[-1].graph)


@ON_CPU
@COMPILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled_code_has_the_gradients_of_eager_code(dtype):
    """With Inductor; of weights too, and of upstream gradients that are not 1."""
    for reduction in ("sum_over_batch_size", "none"):
        p = problem((3, 5), dtype=dtype, reduction=reduction, **CASES["everything"])
        torch._dynamo.reset()
        require_right(p, results(p, call=torch.compile(p.loss(), fullgraph=True)))


@ON_CPU
@COMPILES
def test_compiled_code_under_autocast():
    p = problem(bias=True, ignored=True)
    loss, _ = compiled(p.loss())
    with torch.autocast("cpu", torch.bfloat16):
        require_right(p, results(p, call=loss))


@ON_CPU
@COMPILES
def test_compiled_code_has_nan_for_a_bad_label_and_needs_none():
    p = problem(reduction="none", dtype=torch.float32)
    p.y[3] = 99
    losses = compiled(p.loss())[0](p.y, p.hidden, p.weight)
    assert losses.isnan().tolist() == [i == 3 for i in range(11)]


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_declared_as_they_are(dtype):
    for softcap, masked, bias, smoothing in ((None, False, True, 0.0), (2.0, True, False, 0.1)):
        p = problem(dtype=dtype, bias=bias)
        counted = torch.arange(11) % 3 != 1 if masked else None
        options = (p.y, counted, softcap, dtype, torch.float32, 500, None, [], smoothing)
        q = leaves(p)
        library.opcheck(head.losses, (q.hidden, q.weight, q.bias, *options))
        for needs in ([True, True, bias], [False, True, False], [True, False, False]):
            given = (torch.rand(11), needs, p.hidden, p.weight, p.bias, *options)
            library.opcheck(head.gradients, given)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 13)
        self.loss = LinearSparseCategoricalCrossentropy(ignore_class=-1, logit_softcap=2.0)

    def forward(self, y, x):
        return self.loss(y, x, self.linear.weight, self.linear.bias)


@ON_CPU
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_needs_no_operator(strict):
    step, p = Step(), problem((3, 5), ignored=True)
    rows = {0: torch.export.Dim("b", min=2)}
    program = torch.export.export(step, (p.y, p.hidden), dynamic_shapes=(rows, rows), strict=strict)
    assert "torch_sce" not in str(program.graph)
    p = problem((4, 5), ignored=True)
    torch.testing.assert_close(program.module()(p.y, p.hidden), step(p.y, p.hidden))


@ON_CPU
def test_transforms_have_all_derivatives():
    """Those of PyTorch's operations, a second derivative too."""
    p = problem(bias=True, dtype=torch.float64)
    loss = p.loss()

    def value(w, x, y):
        return loss(y, x, w, p.bias)

    whole = torch.func.grad(value)(p.weight, p.hidden, p.y)
    each = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))(p.weight, p.hidden, p.y)
    torch.testing.assert_close(each.mean(0), whole)
    torch.testing.assert_close(0.7 * whole, exact(p)[0].weight)
    v = torch.randn_like(p.weight)
    along = torch.func.jvp(lambda w: value(w, p.hidden, p.y), (p.weight,), (v,))[1]
    torch.testing.assert_close(along, (whole * v).sum())
    curved = torch.func.hessian(lambda w: value(w, p.hidden[:2], p.y[:2]))(p.weight)
    assert curved.abs().max() > 0


@ON_CPU
@pytest.mark.parametrize("make", [
    lambda mode: mode, lambda mode: torch.no_grad(),
], ids=["mode", "none"])  # fmt: skip
def test_a_mode_sees_pytorch_s_operations(make):
    from torch.utils.flop_counter import FlopCounterMode

    p = problem(bias=True)
    with make(FlopCounterMode(display=False)) as counter:
        found = p.loss()(p.y, p.hidden, p.weight, p.bias)
    torch.testing.assert_close(found, p.loss()(p.y, p.hidden, p.weight, p.bias))
    if counter is not None:
        assert counter.get_total_flops() == 2 * 11 * 7 * 13


@ON_CPU
def test_meta_and_fake_tensors_give_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = problem((3, 5), reduction="none")
    y, x, w = (each.to("meta") for each in (p.y, p.hidden, p.weight))
    assert p.loss()(y, x, w).shape == (3, 5)
    with FakeTensorMode():
        x, w = torch.empty(3, 5, 7, requires_grad=True), torch.empty(13, 7)
        value = p.loss()(torch.zeros(3, 5, dtype=torch.int64), x, w)
        value.sum().backward()
    assert value.shape == (3, 5) and x.grad is not None and x.grad.shape == (3, 5, 7)


def test_a_forward_derivative_takes_the_definition():
    from torch.autograd import forward_ad

    p, v = problem(bias=True), torch.randn(11, 7)
    q = leaves(p)
    (dx,) = torch.autograd.grad(p.loss()(q.y, q.hidden, q.weight, q.bias), q.hidden)
    with forward_ad.dual_level():
        value = p.loss()(p.y, forward_ad.make_dual(p.hidden, v), p.weight, p.bias)
        along = forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(along, (dx * v).sum())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoints_give_the_same_bits(reduction, reentrant):
    p = problem(reduction=reduction, bias=True, ignored=True)
    loss = p.loss()

    def call(*given):
        return torch.utils.checkpoint.checkpoint(loss, *given, use_reentrant=reentrant)

    def step(loss):
        q = leaves(p, GIVEN[:3])
        (loss(q.y, q.hidden, q.weight, q.bias).sum() * 0.7).backward()
        return [getattr(q, name).grad for name in GIVEN[:3]]

    for got, want in zip(step(call), step(loss), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_that_is_the_embedding_too(reduction):
    torch.manual_seed(0)
    embedding, tokens = nn.Embedding(13, 7), torch.randint(0, 13, (2, 6))
    labels, gradients = torch.randint(0, 13, (2, 6)), []
    unfused = SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    fused = LinearSparseCategoricalCrossentropy(reduction=reduction)
    for call in (
        lambda x: fused(labels, x, embedding.weight),
        lambda x: unfused(labels, F.linear(x, embedding.weight)),
    ):
        embedding.weight.grad = None
        for _ in range(2):  # a second step adds to the first
            call(embedding(tokens).tanh()).sum().backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@ON_CPU
def test_a_subclass_of_tensor_takes_pytorch_s_operations(monkeypatch):
    from torch.testing._internal.two_tensor import TwoTensor

    monkeypatch.setattr(head, "_chunks", refuse)
    p = problem(reduction="none")
    found = p.loss()(p.y, TwoTensor(p.hidden, 2 * p.hidden), TwoTensor(p.weight, p.weight))
    assert isinstance(found, TwoTensor)
    unfused = SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    torch.testing.assert_close(found.b, unfused(p.y, 2 * p.hidden @ p.weight.T))


# Errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothing_and_class_weights_are_those_of_the_unfused_loss(
    reduction, known, softcap, path, monkeypatch
):
    """Rows of many chunks, some ignored; gradients with the loss, or in the backward pass."""
    take_path(path, monkeypatch)
    p = problem((3, 5), dtype=torch.float64, bias=True, weighted=True, ignored=True)
    options: dict[str, Any] = {
        "ignore_class": -1, "reduction": reduction, "dtype": "float64", "label_smoothing": 0.1,
        "class_weight": torch.linspace(0, 3, 13),
    }  # fmt: skip
    linear = LinearSparseCategoricalCrossentropy(logit_softcap=softcap, chunk_bytes=500, **options)
    unfused = SparseCategoricalCrossentropy(True, **options)

    def call(y, hidden, weight, bias, *rest):
        z = F.linear(hidden, weight, bias)
        return unfused(y, z if softcap is None else softcap * (z / softcap).tanh(), *rest)

    needs = ("hidden", "weight", "bias") if known else GIVEN
    p = replace(p, options={"reduction": reduction})
    found, want = results(p, needs, linear), results(p, needs, call)
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-12, atol=1e-14)
    if reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
        n = linear.denominator(p.y, p.hidden, p.sample_weight)
        z = p.hidden @ p.weight.T
        assert torch.equal(n, unfused.denominator(p.y, z, p.sample_weight))
        half = linear(p.y, p.hidden, p.weight, p.bias, p.sample_weight, denominator=2 * n)
        torch.testing.assert_close(half, found.value / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_function_smooths_labels(dtype):
    p = problem(dtype=dtype)
    z = F.linear(p.hidden, p.weight)
    found = linear_sparse_categorical_crossentropy(p.y, p.hidden, p.weight, label_smoothing=0.1)
    want = sparse_categorical_crossentropy(p.y, z, True, label_smoothing=0.1)
    torch.testing.assert_close(found, want)


@ON_CPU
@COMPILES
def test_compiled_code_smooths_labels():
    p = problem(label_smoothing=0.1, class_weight={2: 3.0}, reduction="sum")
    z = F.linear(p.hidden, p.weight)
    want = SparseCategoricalCrossentropy(True, **p.options)(p.y, z)
    torch.testing.assert_close(compiled(p.loss())[0](p.y, p.hidden, p.weight), want)


BAD = {
    "a kernel of Keras": (
        lambda p: {"weight": p.weight.t().contiguous()}, ValueError,
        r"^weight must be \(C, H\), .* \(C, 7\), got \(7, 13\) \(hidden has the shape "
        r"\(11, 7\)\)\. A Keras Dense kernel is \(H, C\): pass kernel\.T\.",
    ),
    "a weight of other features": (
        lambda p: {"weight": p.weight[:, 1:]}, ValueError,
        r"^weight must be \(C, H\), .*, got \(13, 6\) \(hidden has the shape \(11, 7\)\)\.$",
    ),
    "a weight with one axis": (lambda p: {"weight": p.weight[0, :1]}, ValueError, r"got \(1,\)"),
    "a weight of no classes": (
        lambda p: {"weight": p.weight[:0]}, ValueError,
        r"at least one class on axis 1, got shape \(11, 0\)\. Here y_pred is hidden @ weight",
    ),
    "a bias of other classes": (
        lambda p: {"bias": torch.zeros(7)}, ValueError,
        r"^bias must be \(C,\), one for each of weight's 13 classes, got \(7,\)",
    ),
    "a scalar": (
        lambda p: {"hidden": torch.tensor(1.0)}, ValueError,
        "^hidden must have an axis of features, got a scalar",
    ),
    "another dtype": (
        lambda p: {"weight": p.weight.half()}, TypeError,
        r"^weight must have hidden's dtype, torch.float32, got torch.float16: .*torch\.autocast",
    ),
    "another dtype of the bias": (
        lambda p: {"bias": torch.zeros(13).double()}, TypeError,
        r"^bias must have hidden's dtype, torch.float32, got torch.float64",
    ),
    "swapped": (
        lambda p: {"y": p.hidden, "hidden": p.y}, TypeError,
        "^hidden must be float16, .* got torch.int64: are labels and hidden states swapped",
    ),
    "an integer weight": (
        lambda p: {"weight": p.weight.int()}, TypeError,
        r"^weight must be float16, .* got torch\.int32$",
    ),
    "no weight": (lambda p: {"weight": None}, TypeError, "^weight must hold numbers, got None"),
    "another device": (
        lambda p: {"weight": p.weight.to("meta")}, ValueError,
        r"^weight must be on hidden's device, .*, got meta: move it with weight\.to",
    ),
    "a label out of range": (
        lambda p: {"y": p.y.index_fill(0, torch.tensor(3), 13)}, ValueError,
        r"^y_true must hold labels in \[0, 13\), .* got 13 at position \(3,\)",
    ),
    "a label to be ignored": (
        lambda p: {"y": p.y.index_fill(0, torch.tensor(3), -1)}, ValueError, "pass ignore_class=-1",
    ),
    "other labels": (
        lambda p: {"y": p.y[1:]}, ValueError,
        r"^y_true must have the shape of y_pred without its class axis, \(11,\), got \(10,\)"
        r".* Here y_pred is hidden @ weight\.T\.$",
    ),
    "class weights": (
        lambda p: {"options": {"class_weight": [1.0, 2.0]}}, ValueError,
        "^class_weight must have one weight for each of the 13 classes, got 2",
    ),
    "a class weight": (
        lambda p: {"options": {"class_weight": {13: 2.0}}}, ValueError,
        r"^class_weight must have classes in \[0, 13\) as keys, got 13",
    ),
    "a mask": (
        lambda p: {"mask": torch.ones(12)}, ValueError,
        r"^mask must broadcast to the losses' shape \(11,\), got \(12,\)",
    ),
    "a weight of samples": (
        lambda p: {"sample_weight": torch.ones(2)}, ValueError,
        r"^sample_weight must broadcast to the losses' shape \(11,\), got \(2,\)",
    ),
}  # fmt: skip


@ON_CPU
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_computed(case, monkeypatch):
    change, error, message = BAD[case]
    p = problem(bias=False)
    p = replace(p, **change(p))
    for name in ("mm", "addmm", "matmul"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(F, "linear", refuse)
    given: Any = (p.y, p.hidden, p.weight, p.bias)
    for reduction in ("mean", "none"):
        with pytest.raises(error, match=message):
            p.loss(reduction=reduction)(*given, sample_weight=p.sample_weight, mask=p.mask)
    if p.mask is None and p.sample_weight is None and not p.options:
        with pytest.raises(error, match=message):
            linear_sparse_categorical_crossentropy(*given)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"logit_softcap": 0}, ValueError, "^logit_softcap must be a positive number, got 0"),
    ({"logit_softcap": -2.0}, ValueError, r"got -2\.0"),
    ({"logit_softcap": float("inf")}, ValueError, "got inf"),
    ({"logit_softcap": float("nan")}, ValueError, "got nan"),
    ({"logit_softcap": "30"}, TypeError, "^logit_softcap must be a positive .* or None, got '30'"),
    ({"logit_softcap": True}, TypeError, "got True"),
    ({"chunk_bytes": 0}, ValueError, "^chunk_bytes must be at least 1, got 0"),
    ({"chunk_bytes": 1e6}, TypeError, "^chunk_bytes must be an integer, got 1000000.0"),
    ({"chunk_bytes": True}, TypeError, "got True"),
    ({"ignore_class": "void"}, TypeError, "^ignore_class must be a number or None, got 'void'"),
    ({"label_smoothing": 2}, ValueError, r"^label_smoothing must be in \[0, 1\], got 2"),
])  # fmt: skip
def test_wrong_options_are_refused_by_class_and_function_and_on_assignment(options, error, message):
    with pytest.raises(error, match=message):
        LinearSparseCategoricalCrossentropy(**options)
    with pytest.raises(error, match=message):
        linear_sparse_categorical_crossentropy([0], [[1.0]], [[1.0]], **options)
    loss = LinearSparseCategoricalCrossentropy()
    before = loss.get_config()
    for name, value in options.items():
        with pytest.raises(error, match=message):
            setattr(loss, name, value)
    assert loss.get_config() == before
    with pytest.raises(ValueError, match="reduction must be one of"):
        loss.reduction = "average"  # pyright: ignore


# The module


OPTIONS: dict[str, Any] = {
    "ignore_class": -1, "reduction": "sum", "logit_softcap": 30.0, "name": "n", "dtype": "float64",
    "chunk_bytes": 1000, "label_smoothing": 0.1, "class_weight": {3: 2.0},
}  # fmt: skip


def test_a_config_round_trips():
    assert LinearSparseCategoricalCrossentropy().get_config() == {
        "ignore_class": None, "reduction": "sum_over_batch_size", "logit_softcap": None,
        "name": "linear_sparse_categorical_crossentropy", "dtype": "float32", "chunk_bytes": None,
        "label_smoothing": 0.0,
    }  # fmt: skip
    loss = LinearSparseCategoricalCrossentropy(**OPTIONS)
    assert loss.get_config() == OPTIONS
    serialized = {"class_name": "LinearSparseCategoricalCrossentropy", "config": OPTIONS}
    for config in (OPTIONS, serialized):
        again = LinearSparseCategoricalCrossentropy.from_config(config)
        assert again.get_config() == OPTIONS and repr(again) == repr(loss)
    with pytest.raises(ValueError, match=r"no options \['axis'\], only \['ignore_class'"):
        LinearSparseCategoricalCrossentropy.from_config({"axis": 1})


def test_its_repr_names_what_is_not_default():
    assert repr(LinearSparseCategoricalCrossentropy()) == "LinearSparseCategoricalCrossentropy()"
    assert repr(LinearSparseCategoricalCrossentropy(**OPTIONS)) == (
        "LinearSparseCategoricalCrossentropy(ignore_class=-1, label_smoothing=0.1, "
        "reduction='sum', logit_softcap=30.0, name='n', dtype='float64', chunk_bytes=1000, "
        "class_weight={3: 2.0})"
    )


class Scaled(LinearSparseCategoricalCrossentropy):
    """A subclass with a constructor of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__(reduction="sum")
        self.factor = factor

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self.factor * super().forward(*given, **named)


@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)),
    lambda loss: nn.Sequential(loss).double()[0],
])  # fmt: skip
@pytest.mark.parametrize("loss", [LinearSparseCategoricalCrossentropy(**OPTIONS), Scaled(3.0)])
def test_copies_and_moves_change_nothing(loss, copied):
    p = problem(dtype=torch.float64)
    other = copied(loss)
    assert other.get_config() == loss.get_config() and repr(other) == repr(loss)
    assert torch.equal(other(p.y, p.hidden, p.weight), loss(p.y, p.hidden, p.weight))
    assert not list(loss.parameters()) and not loss.state_dict()


@pytest.mark.parametrize(("name", "given", "parsed"), [
    ("logit_softcap", 30, 30.0), ("chunk_bytes", torch.tensor(1000).numpy()[()], 1000),
    ("dtype", "bfloat16", torch.bfloat16), ("reduction", None, None), ("name", None, None),
])  # fmt: skip
def test_options_set_later_are_parsed_and_take_effect(name, given, parsed):
    loss: Any = LinearSparseCategoricalCrossentropy()
    setattr(loss, name, given)
    made = LinearSparseCategoricalCrossentropy(**{name: given})
    parsed = linear_module.NAME if name == "name" else parsed
    for each in (loss, made):
        assert getattr(each, name) == parsed and type(getattr(each, name)) is type(parsed)
    p = problem()
    first, second = (each(p.y, p.hidden, p.weight) for each in (loss, made))
    assert torch.equal(first, second) and first.dtype == second.dtype


# Mistakes


def chunk_dropped(monkeypatch):
    right = head._chunks

    def chunks(given):
        yield from (chunk for chunk in right(given) if len(chunk[1]) == 4)

    monkeypatch.setattr(head, "_chunks", chunks)


def last_chunk_twice(monkeypatch):
    right = head._SumOfProducts.add

    def add(self, dz, x):
        right(self, dz * (1 + (len(x) < 4)), x)

    monkeypatch.setattr(head._SumOfProducts, "add", add)


def product_not_added(monkeypatch):
    right = head._SumOfProducts.add

    def add(self, dz, x):
        if self.chunks == 0 or len(x) < 4:
            right(self, dz, x)

    monkeypatch.setattr(head._SumOfProducts, "add", add)


def stale_product(monkeypatch):
    right = head._SumOfProducts.add

    def add(self, dz, x):
        right(self, dz, x)
        self.chunks = 0  # beta is 0 for each chunk

    monkeypatch.setattr(head._SumOfProducts, "add", add)
    monkeypatch.setattr(head._SumOfProducts, "value", lambda self: self.part)


def mean_per_chunk(monkeypatch):
    right = head.gradients

    def gradients(g, *rest):
        return right(g * len(g) / 4, *rest)

    monkeypatch.setattr(head, "gradients", gradients)


def no_slope(monkeypatch):
    monkeypatch.setattr(head, "_slope", lambda *given: None)


def written_over_hidden(monkeypatch):
    """x is a part of the caller's tensor if all rows count."""
    right = head._chunks

    def chunks(given):
        for chunk in right(given):
            yield chunk
            chunk[1].zero_()

    monkeypatch.setattr(head, "_chunks", chunks)


def bias_left_out(monkeypatch):
    right = head._prepared
    monkeypatch.setattr(head, "_prepared", lambda given: right(given)._replace(bias=None))


def rows_that_do_not_count_added(monkeypatch):
    right = head._prepared
    monkeypatch.setattr(head, "_prepared", lambda given: right(given)._replace(counted=None))


def wrong_rows(monkeypatch):
    right = head._put

    def put(whole, rows, part):
        right(whole, rows, part.flip(0))

    monkeypatch.setattr(head, "_put", put)


def upstream_left_out(monkeypatch):
    def backward(ctx, *_upstream):
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=False)
        return None, *(d if need else None for d, need in pairs), None, None, None

    monkeypatch.setattr(linear_module._WithGradients, "backward", staticmethod(backward))


MISTAKES = (
    chunk_dropped, last_chunk_twice, product_not_added, stale_product, mean_per_chunk, no_slope,
    written_over_hidden, bias_left_out, rows_that_do_not_count_added, wrong_rows,
    upstream_left_out,
)  # fmt: skip


def check(monkeypatch):
    """Chunks of four rows, the last of three; with nothing else, and with everything."""
    small_chunks(monkeypatch, 4)
    for options in (
        {},
        {"reduction": "none", "bias": True},
        {"bias": True, "masked": True, "logit_softcap": 2.0},
    ):
        p = problem(**options)
        require_inputs_unchanged(p)
        p.hidden[~p.counted()] = torch.nan
        require_right(p, results(p, GIVEN[:3]))


def test_right_code_passes_the_check_of_mistakes(monkeypatch):
    check(monkeypatch)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


def test_chunks_are_about_equal_and_of_whole_64_rows_if_there_are_as_many():
    for n, most in product(range(1, 700, 3), (1, 2, 63, 64, 65, 127, 128, 200, 1000)):
        step = head._step(n, most)
        unit = 64 if most >= 64 else 1
        assert step % unit == 0 and 1 <= step <= most
        chunks = -(-n // step)
        assert chunks == -(-n // (most // unit * unit)) or n % step == 0
    assert head._step(0, 5) == 1
