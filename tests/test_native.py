"""The extension, at every boundary of cpu.c: memory, numbers, rows by themselves, units of work.

`make test-sanitized` runs this file with the extension compiled with sanitizers.
"""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from guarded import Guarded
from test_cpu import results_of_threads
from torch import Tensor

from torch_sce.kernels import aten, cpu, native, row_losses, target_losses, targets
from torch_sce.kernels.aten import row_dtype
from torch_sce.samples import CLIP

pytestmark = pytest.mark.skipif(not native, reason="the package was installed without a C compiler")

LANES, SEGMENT = 64, 32768  # as in cpu.c
# Rows and classes around a block of lanes, half and two of them: fewer classes than LANES, for sums
# than two LANES, are in blocks of rows, others in parts of a row, of which a block has 1024.
SIZES = (
    *product((1, 63, 64, 65), (1, 2, 3, 4, 5, 31, 32, 33, 63)),
    *product((2, 130), (3, 33, 129)),
    *product((1, 65), (64, 65, 127, 128, 129, 1023, 1024, 1025)),
)
SEGMENTED = tuple(product((1, 2), (2 * SEGMENT - 1, 2 * SEGMENT, 2 * SEGMENT + 1)))
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODELS = ("logits", "probabilities")
RANGE = 6.0  # of the logits of a row


@dataclass
class Rows:
    """Rows with labels y, or with targets t."""

    z: Tensor
    g: Tensor
    y: Tensor | None = None
    t: Tensor | None = None
    counted: Tensor | None = None
    clip: tuple[float, float] | None = None
    smoothing: float = 0.0


@dataclass
class Results:
    """What is written; dt is None for labels."""

    loss: Tensor
    dz: Tensor
    dt: Tensor | None = None


def make_rows(model, dtype, rows, classes, of_targets=False, t_dtype=None, seed=0) -> Rows:
    generator = torch.Generator().manual_seed(seed + 7 * rows + classes)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    logits = model == "logits"
    z = uniform(rows, classes)
    z = (RANGE * (z - 0.5) if logits else 0.02 + 0.96 * z).to(dtype)
    g = (2 * uniform(rows) - 1).to(row_dtype(z))
    clip = None if logits else CLIP[dtype]
    if not of_targets:
        y = torch.randint(0, classes, (rows,), generator=generator)
        y[-1] = classes - 1
        return Rows(z, g, y=y, clip=clip)
    t = uniform(rows, classes)
    t_dtype = t_dtype or dtype
    t = (t if t_dtype.is_floating_point else (t * 4 - 1).clamp(min=0).floor()).to(t_dtype)
    return Rows(z, g, t=t, clip=clip, smoothing=0.1 if seed % 2 else 0.0)


# From (N, C) to other places in memory, by the strides; rows on two axes if `split`.
def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_first(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def padded(x: Tensor) -> Tensor:
    """Rows with three elements between them."""
    return strided(x, (x.shape[1] + 3, 1))


def every_other(x: Tensor) -> Tensor:
    return strided(x, (2 * x.shape[1] + 1, 2))


def maps_with_gaps(x: Tensor) -> Tensor:
    """Channels first, on two axes of rows that cannot be joined."""
    n = next(n for n in (13, 7, 2, 1) if x.shape[0] % n == 0)
    x = x.reshape(-1, n, x.shape[1])
    return strided(x, (n * x.shape[2] + 5, 1, n))


def runs_with_gaps(x: Tensor) -> Tensor:
    """Rows without gaps, but for one after every thirteen or so."""
    n = next(n for n in (13, 7, 2, 1) if x.shape[0] % n == 0)
    x = x.reshape(-1, n, x.shape[1])
    return strided(x, (n * x.shape[2] + 5, x.shape[2], 1))


def strided(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
    return x.new_zeros(elements).as_strided(x.shape, strides).copy_(x)


def nans(x: Tensor) -> Tensor:
    """With the strides of x."""
    return strided(torch.full(x.shape, torch.nan, dtype=x.dtype), x.stride())


LAYOUTS = (contiguous, channels_first, padded, every_other, runs_with_gaps, maps_with_gaps)
IN_PLACE = (contiguous, channels_first, padded, runs_with_gaps, maps_with_gaps)


def laid_out(rows: Rows, layout, t_layout=None) -> Rows:
    z = layout(rows.z)

    def over(x):
        return None if x is None else x.reshape(z.shape[:-1])

    t = None if rows.t is None else (t_layout or layout)(rows.t).reshape(z.shape)
    return Rows(z, rows.g.reshape(z.shape[:-1]), over(rows.y), t, over(rows.counted), rows.clip,
                rows.smoothing)  # fmt: skip


def results(rows: Rows, first: bool, dz_layout=None) -> Results:
    """Forward and backward, with all tensors guarded; of the shapes (N,) and (N, C).

    dz has the strides of z, or a layout of its own.
    """
    z, t = rows.z, rows.t
    shape, real, classes = z.shape[:-1], row_dtype(z), z.shape[-1]
    inputs = {name: Guarded(x, first) for name, x in vars(rows).items() if isinstance(x, Tensor)}
    numbers = 2 if t is None and rows.clip and not rows.smoothing else 3
    saved = torch.full((numbers, *shape), torch.nan, dtype=real)
    outputs = {"loss": saved[0], "saved": saved, "dz": nans(dz_layout(z) if dz_layout else z)}
    if t is not None and t.is_floating_point():
        outputs["dt"] = nans(t)
    outputs = {name: Guarded(x, first) for name, x in outputs.items()}
    given = {name: each.tensor for name, each in inputs.items()}
    z, g, t = given.pop("z"), given.pop("g"), given.pop("t", None)
    made = {name: each.tensor for name, each in outputs.items()}
    options = {"clip": rows.clip, "smoothing": rows.smoothing, "saved": made["saved"]}
    cpu.run(False, z, t, loss=made["loss"], **given, **options)
    outputs["loss"].require_canaries()
    outputs["saved"].require_canaries()
    cpu.run(True, z, t, made["dz"], made.get("dt"), g=g, **given, **options)
    for each in inputs.values():
        each.require_unchanged()
    for each in outputs.values():
        each.require_canaries()
    dt = made["dt"].reshape(-1, classes) if "dt" in made else None
    return Results(made["loss"].reshape(-1), made["dz"].reshape(-1, classes), dt)


def definition(rows: Rows) -> Results:
    """The same by the definitions in float64."""
    z = rows.z.double().requires_grad_()
    t = None if rows.t is None else rows.t.double().requires_grad_()
    if t is None:
        assert rows.y is not None
        losses = aten.row_losses(z, rows.y, rows.counted, rows.clip)
    else:
        losses = targets.losses(z, t, rows.counted, rows.clip, rows.smoothing)
    leaves = (z,) if t is None else (z, t)
    dz, *dt = (
        each.reshape(-1, z.shape[-1])
        for each in torch.autograd.grad(losses, leaves, rows.g.double())
    )
    return Results(losses.detach().reshape(-1), dz, dt[0] if dt else None)


def allowed(rows: Rows, want: Results) -> Results:
    """How far the results may be off, from the number of roundings on their way.

    u is a rounding of the dtype that rows are computed in. An exponential is off by 2.2 u and by
    its argument's rounding; a block has k terms in a sum, one after the other; m rises at most
    once in a block. The definition's float64 has roundings, too: for float64 there are twice as
    many, and where it subtracts what cpu.c does not, the difference's are added.
    """
    z, g = rows.z.double().reshape(len(want.dz), -1), rows.g.double().reshape(-1, 1).abs()
    classes = z.shape[-1]
    u = torch.finfo(row_dtype(rows.z)).eps / 2 * (2 if rows.z.dtype == torch.float64 else 1)
    k, blocks = min(classes, LANES), -(-classes // LANES)
    log_s = RANGE + torch.tensor(classes).log()
    if rows.t is None:
        exponential = 3 + RANGE
        s = k + exponential * (1 + blocks**0.5) if rows.clip is None else k + 2
        loss = u * (s + 2 * RANGE + 2 * want.loss.abs() + 2)
        dz = u * (2 * s + exponential + 6) * want.dz.abs()
        least = 1.0 if rows.clip is None else z.clamp(*rows.clip).amin(-1, keepdim=True)
        return Results(loss, dz + 2**-51 * g / least)
    t = rows.t.double().reshape(z.shape).abs() + rows.smoothing
    total = t.sum(-1, keepdim=True)
    if rows.clip is None:
        s = k + (3 + RANGE) * (2 + blocks**0.5)
        loss = u * (s + k + 6) * (total * (1 + log_s)).squeeze(-1)
        dz = u * (s + k + 6) * g * (total * z.softmax(-1) + t)
        return Results(loss, dz, u * (s + 6) * g * log_s)
    s = z.sum(-1, keepdim=True)
    c = (z / s).clamp(*rows.clip)
    log_c = c.log().abs().nan_to_num().amax(-1, keepdim=True)
    loss = u * (k + 6) * (total * (1 + 2 * log_c)).squeeze(-1)
    dz = u * (2 * k + 8) * g / s * (total + t / c)
    return Results(loss, dz, u * (k + 6) * g * (1 + log_c))


def require_close(found: Results, want: Results, within: Results) -> None:
    for name, value in vars(found).items():
        if value is not None:
            require_all_close(value, getattr(want, name), getattr(within, name), name)


def require_all_close(found: Tensor, want: Tensor, within: Tensor, name: str) -> None:
    """Of halves, what is off is also half a unit in the last place."""
    limits = torch.finfo(found.dtype)
    if found.dtype in (torch.bfloat16, torch.float16):
        within = within + want.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps
    within = within + torch.finfo(torch.float32).smallest_normal  # smaller exponentials are 0
    same = (found == want.to(found.dtype)) | (found.isnan() & want.isnan())
    wrong = ~(same | ((found.double() - want).abs() <= within))
    place = tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None
    assert place is None, (
        f"{name} of {found.shape}: {int(wrong.sum())} differ, first at {place}: {found[place]} and "
        f"not {want[place]} within {within.expand_as(want)[place]}"
    )


def require_same_bits(a: Results, b: Results) -> None:
    for name, value in vars(a).items():
        assert value is None or same_bits(value, getattr(b, name)), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaNs and zeros."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def require_right(rows: Rows, both_ends: bool = True) -> None:
    """By the definition, at the end of memory and, in the same bits, at its beginning."""
    found, want = results(rows, first=False), definition(rows)
    require_close(found, want, allowed(rows, want))
    if both_ends:
        require_same_bits(results(rows, first=True), found)


# Blocks of halves are copied in every layout, lane by lane or step by step.
COPIED = product(FLOATS[2:], (contiguous, channels_first, maps_with_gaps))


@pytest.mark.parametrize(("dtype", "layout"), [*product(FLOATS[:2], LAYOUTS), *COPIED])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_rows_of_any_size_anywhere_in_memory_equal_the_definition(of_targets, model, dtype, layout):
    both_ends = layout in (contiguous, channels_first)
    for size in SIZES:
        require_right(laid_out(make_rows(model, dtype, *size, of_targets), layout), both_ends)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_rows_of_several_segments_equal_the_definition(of_targets, model, dtype):
    """The highest logits are in one segment, the label in any, last before or behind a cut."""
    for number, (rows, classes) in enumerate(SEGMENTED):
        given = make_rows(model, dtype, rows, classes, of_targets)
        if model == "logits":
            given.z.mul_(0.5)[:, (number % 2) * SEGMENT :][:, :SEGMENT] -= RANGE / 2
        if given.y is not None:
            given.y[-1] = (SEGMENT - 1, SEGMENT, 0, classes - 1)[number % 4]
        require_right(laid_out(given, contiguous if number % 2 else padded))


@pytest.mark.parametrize("layout", [contiguous, channels_first, every_other])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
def test_any_class_may_be_the_label(model, dtype, layout):
    for classes in (5, 32, 63, 64, 65, 127, 128, 129):
        given = make_rows(model, dtype, classes, classes)
        given.y = torch.arange(classes)
        require_right(laid_out(given, layout))
    given = make_rows(model, dtype, 33, 1025)
    given.y = torch.arange(33) * 32
    require_right(laid_out(given, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
def test_smoothed_labels_have_the_bits_of_one_hot_targets(model, dtype, layout):
    for number, size in enumerate((*SIZES, (1, 2 * SEGMENT + 1))):
        given = make_rows(model, dtype, *size)
        given.smoothing = 0.1
        assert given.y is not None
        if number % 2:
            given.counted = torch.arange(size[0]) % 5 != 1
        hot = torch.nn.functional.one_hot(given.y, size[1]).to(torch.uint8)
        want = Rows(given.z, given.g, t=hot, counted=given.counted, clip=given.clip, smoothing=0.1)
        given = laid_out(given, layout)
        require_same_bits(results(given, False), results(laid_out(want, layout), False))
        if layout in IN_PLACE:
            require_same_in_place(given, first=number % 4 < 2)


@pytest.mark.parametrize("t_dtype", cpu.KINDS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_targets_of_any_dtype_in_another_layout_equal_the_definition(model, t_dtype):
    z_layouts = LAYOUTS[:4]
    for number, size in enumerate(((2, 5), (65, 33), (64, 64), (3, 129), (2, 1025))):
        t_layouts = z_layouts[number % 4 :] + z_layouts[: number % 4]
        for z_layout, t_layout in zip(z_layouts, t_layouts, strict=True):
            for dtype in FLOATS[::2]:
                given = make_rows(model, dtype, *size, True, t_dtype, seed=number)
                require_right(laid_out(given, z_layout, t_layout), both_ends=False)


@pytest.mark.parametrize("layout", [contiguous, channels_first, padded, every_other])
@pytest.mark.parametrize("dz_layout", [contiguous, channels_first, padded, every_other])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_gradients_may_have_another_layout(of_targets, model, layout, dz_layout):
    for dtype, size in product(FLOATS[::2], ((1, 5), (65, 5), (130, 33), (3, 65), (2, 1025))):
        rows = laid_out(make_rows(model, dtype, *size, of_targets), layout)
        require_same_bits(results(rows, False, dz_layout), results(rows, False))


def require_same_in_place(rows: Rows, first: bool) -> None:
    """The gradient over its own predictions has the bits of the one in another tensor."""
    want = results(rows, first)
    inputs = {name: Guarded(x, first) for name, x in vars(rows).items() if isinstance(x, Tensor)}
    given = {name: each.tensor for name, each in inputs.items()}
    z, g = given.pop("z"), given.pop("g")
    shape = (2 if rows.clip and not rows.smoothing else 3, *z.shape[:-1])
    saved = torch.empty(shape, dtype=row_dtype(z))
    options = {"clip": rows.clip, "smoothing": rows.smoothing, "saved": saved}
    loss = torch.empty_like(saved[0])
    cpu.run(False, z, loss=loss, **given, **options)
    cpu.run(True, z, dz=z, g=g, **given, **options)
    for name, each in inputs.items():
        each.require_canaries() if name == "z" else each.require_unchanged()
    found = Results(loss.reshape(-1), z.reshape(-1, z.shape[-1]))
    require_same_bits(found, want)


@pytest.mark.parametrize("layout", IN_PLACE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_may_be_written_over_their_predictions(model, dtype, layout):
    """A block that is computed again, the last of a row, must not be read again."""
    for number, size in enumerate(SIZES):
        given = make_rows(model, dtype, *size)
        if number % 2:
            given.counted = torch.arange(size[0]) % 5 != 1
        require_same_in_place(laid_out(given, layout), first=number % 4 < 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_several_segments_may_be_written_over_their_predictions(model, dtype):
    for number, size in enumerate(SEGMENTED):
        given = make_rows(model, dtype, *size)
        given.counted = torch.tensor([True, False]) if size[0] == 2 else None
        labels = (size[1] - 1, SEGMENT - 1, SEGMENT, size[1] - LANES)
        given.y = torch.tensor([0, labels[number % 4]][-size[0] :])
        require_same_in_place(laid_out(given, padded if number % 2 else contiguous), number < 3)


@pytest.mark.parametrize("layout", IN_PLACE)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_over_predictions_have_any_label(model, layout):
    """Near the end of a row too, whose last classes are computed twice."""
    for classes in (5, 65, 127, 129):
        given = make_rows(model, torch.float32, classes, classes)
        given.y = torch.arange(classes)
        given.z[1], given.z[2] = torch.nan, torch.inf
        require_same_in_place(laid_out(given, layout), first=False)


UNUSUAL = (torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 2.0)
OUTSIDE = (-1, -(2**62), 2**31, 2**62)


@pytest.mark.parametrize("layout", [contiguous, channels_first, every_other])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_unusual_rows_equal_the_definition(of_targets, model, dtype, layout):
    """NaNs, infinities, at and outside the bounds, labels outside, rows that do not count."""
    for classes in (1, 2, 5, 63, 64, 65, 129, 1025):
        given = make_rows(model, dtype, 66, classes, of_targets, seed=classes)
        values = (*UNUSUAL, *(given.clip or (-3.0, 3.0)))
        for number, (value, place) in enumerate(product(values, (0, classes // 2, classes - 1))):
            if not (of_targets and model == "probabilities" and value <= 0):  # s may be 0
                given.z[number, place] = value
        given.z[30] = 0.5 if of_targets else -torch.inf
        given.counted = torch.ones(66, dtype=torch.bool)
        given.counted[40::3] = given.counted[LANES:] = False  # some of a block, and all of one
        for x in (given.z, given.g, given.t):
            if x is not None and x.is_floating_point():
                x[~given.counted] = torch.nan
        if given.y is not None:
            given.y[:30:4], given.y[1] = given.z.shape[-1], -1
            given.y[31 : 31 + len(OUTSIDE)] = torch.tensor(OUTSIDE)
        require_right(laid_out(given, layout))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_a_row_has_the_same_bits_alone_and_in_any_order(of_targets, model, dtype):
    for classes, layout in product((3, 63, 64, 129, 1025), (contiguous, channels_first)):
        given = laid_out(make_rows(model, dtype, 131, classes, of_targets), layout)
        given.z[5], given.counted = torch.nan, torch.arange(131) % 7 != 1
        found = results(given, first=False)
        order = torch.randperm(131, generator=torch.Generator().manual_seed(0))
        # A copy in the other order, in the same layout; and views of single rows.
        shuffled = results(laid_out(some_rows(given, order), layout), first=False)
        require_same_bits(shuffled, some_rows(found, order))
        for row in (0, 1, 5, 8, 63, 64, 70, 127, 128, 130):
            alone = slice(row, row + 1)
            require_same_bits(
                results(some_rows(given, alone), first=False), some_rows(found, alone)
            )


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_of_several_segments_has_the_same_bits_alone(dtype):
    given = make_rows("logits", dtype, 5, 3 * SEGMENT + 7)
    given.z[2, 5] = torch.nan
    found = results(given, first=False)
    for row in range(5):
        alone = slice(row, row + 1)
        require_same_bits(results(some_rows(given, alone), first=False), some_rows(found, alone))


def some_rows(whole, rows):
    """Of `Rows` or `Results`."""
    parts = {name: x[rows] for name, x in vars(whole).items() if isinstance(x, Tensor)}
    return type(whole)(**{**vars(whole), **parts})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_the_bits_of_other_dtypes_are_the_same_for_any_number_of_threads(of_targets, model, dtype):
    """Those of float32, with all rows counted: test_cpu.py.

    A thread has at least 32768 predictions, of few classes 8192.
    """
    for size, layout in (
        ((170, 1000), padded),
        ((1, 180_001), contiguous),
        ((8000, 21), contiguous),
    ):
        given = laid_out(make_rows(model, dtype, *size, of_targets), layout)
        given.counted = torch.arange(size[0]) % 5 != 1
        one, *others = results_of_threads(lambda given=given: results(given, first=False))
        for other in others:
            require_same_bits(other, one)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("of_targets", [False, True])
def test_no_loss_of_any_size_is_negative(of_targets, dtype):
    """Where the label is nearly or quite certain: not below 0 by a rounding, and not -0.0."""
    margins = torch.cat([torch.arange(0, 30, 0.25), torch.tensor([90.0, 800.0, 3e4])])
    rows = len(margins)
    for model, classes in product(MODELS, (1, 2, 5, 64, 129, 1025)):
        given = make_rows("logits", torch.float64, rows, classes)
        assert given.y is not None
        y = given.y.unsqueeze(-1)
        given.z.scatter_(-1, y, given.z.amax(-1, keepdim=True) + margins.unsqueeze(-1))
        z = given.z if model == "logits" else given.z.softmax(-1)
        given = Rows(z.to(dtype), given.g.to(row_dtype(z.to(dtype))), given.y)
        given.clip = None if model == "logits" else CLIP[dtype]
        if of_targets:
            given.y, given.t = None, torch.zeros_like(given.z).scatter(-1, y, 1)
        for layout in (contiguous, channels_first):
            loss = results(laid_out(given, layout), first=False).loss
            assert (loss >= 0).all() and not loss.signbit().any()


def halves(dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", FLOATS[2:])
def test_every_half_is_widened_as_pytorch_does_it(dtype):
    """p, which is saved, is z_y: in blocks of rows, of one class and few, and of parts of rows."""
    for classes in (1, 4, 2 * LANES):
        z = halves(dtype).view(-1, classes)
        saved = torch.empty(3, len(z))
        for label in range(classes):
            y = torch.full((len(z),), label)
            cpu.run(False, z, y=y, loss=torch.empty(len(z)), saved=saved, clip=None)
            want = z[:, label].float()
            assert torch.equal(saved[1].isnan(), want.isnan())
            assert same_bits(saved[1].nan_to_num(), want.nan_to_num())


# The lower halves of float32 numbers: around a half of bfloat16's last place, and of float16's.
LOWER = (
    0,
    1,
    0x7FFF,
    0x8000,
    0x8001,
    0xFFFF,
    0x0FFF,
    0x1000,
    0x1001,
    0x1FFF,
    0x2FFF,
    0x3000,
    0x3001,
)


@pytest.mark.parametrize("layout", [contiguous, channels_first])
@pytest.mark.parametrize("classes", [2, LANES])
@pytest.mark.parametrize("dtype", FLOATS[2:])
def test_float32_is_rounded_to_halves_as_pytorch_does_it(dtype, classes, layout):
    """With s = 1 the gradient of classes that are not the label is g, whatever it is."""
    random = torch.randint(0, 2**16, (2**16,), generator=torch.Generator().manual_seed(0))
    for lower in (*LOWER, random) if classes == 2 else (0x8000, random):
        g = (torch.arange(-(2**15), 2**15) * 2**16 + lower).to(torch.int32).view(torch.float32)
        g = g if classes == 2 else g[::16]
        q = torch.zeros(classes, dtype=dtype).index_fill(0, torch.tensor([0, 1]), 0.5)
        y = torch.zeros(len(g), dtype=torch.int64)
        given = laid_out(Rows(q.expand(len(g), -1), g, y), layout)
        given.clip = (0.0, 1.0)
        dz = results(given, first=False).dz[:, 1:]
        want = g.unsqueeze(-1).to(dtype).expand_as(dz)
        assert torch.equal(dz.isnan(), want.isnan())
        assert same_bits(dz.nan_to_num(), want.nan_to_num())


# Those of the benchmark: rows, and classes.
BENCHMARKS = ((1024, 32000), (256, 128256), (16, 128256), (4096, 1000), (131072, 21))


@pytest.mark.parametrize("shape", [*BENCHMARKS, (8, 256, 256, 21)], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("of_targets", [False, True])
def test_there_is_work_for_64_threads(of_targets, backward, shape):
    """64 units of work and more, or one for each row."""
    rows = torch.zeros(shape[-1]).expand(shape)  # in the memory of one
    saved, y = torch.ones(3, *shape[:-1]), torch.zeros(shape[:-1], dtype=torch.int64)
    t, y = (rows, None) if of_targets else (None, y)
    if backward:
        dz = torch.zeros(shape[-1]).expand(shape)
        units = cpu.run(True, rows, t, dz, y=y, g=saved[0], saved=saved, clip=None)
    else:
        units = cpu.run(False, rows, t, y=y, loss=saved[0].clone(), saved=saved, clip=None)
    assert units >= min(64, len(saved[0].flatten()))


def test_subnormal_halves_are_read_where_the_processor_flushes_subnormal_floats():
    q = torch.tensor([[3e-5, 0.9]], dtype=torch.float16)
    want = cpu.forward(q, torch.tensor([0]), None, CLIP[torch.float16])[0]
    assert torch.set_flush_denormal(True)
    try:
        found = cpu.forward(q, torch.tensor([0]), None, CLIP[torch.float16])[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, want) and 10 < found < 11


def test_a_bool_is_one_whatever_its_byte():
    z, t = torch.randn(3, 5), torch.tensor([[2, 0, 1, 0, 255]] * 3, dtype=torch.uint8)
    losses = [target_losses(z, x) for x in (t.view(torch.bool), t.bool())]
    assert torch.equal(*losses)


def test_rows_of_minus_infinity_are_nan():
    for classes in (5, 64, 1100):
        z = torch.full((2, classes), -torch.inf)
        assert row_losses(z, torch.tensor([0, 1])).isnan().all()
