"""Triton's kernels: what they do beyond `test_kernels.py`, on a GPU or in Triton's interpreter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kernels import IGNORED, MODELS, counted_in, definition, rows
from ulps import ulps

from torch_sce import kernels
from torch_sce.kernels import cuda, cuda_targets, targets
from torch_sce.kernels.contract import SmoothedLabels
from torch_sce.kernels.cuda import LONG, PROGRAMS, TILE, WIDE, Tile, choose_tile, rows_of


def loss_and_gradient(z, y, g, clip):
    """Both passes on z with its strides."""
    given = (z, y, counted_in(y), clip)
    loss, saved = cuda.forward(*given)
    return loss, cuda.backward(g, *given, saved)


def check(z, y, g, clip):
    """Both passes on z with its strides against the definition in float64."""
    loss, dz = loss_and_gradient(z, y, g, clip)
    exact = z.double().requires_grad_()
    right = definition(exact, y, clip)
    (want,) = torch.autograd.grad(right, exact, g.double())
    assert dz.dtype == z.dtype and dz.shape == z.shape
    assert ulps(loss, right, right.detach().abs().clamp(min=1)) <= 6
    size = torch.maximum(want.abs().amax(-1), g.abs()).unsqueeze(-1)
    # float16 overflows where probabilities are tiny.
    assert ulps(dz, want.to(z.dtype), size * torch.finfo(z.dtype).eps / 2**-23) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(3, 1), (3, LONG), (2, LONG + 1), (2, 4 * LONG - 1), (70, 21)])
def test_rows_of_one_tile_and_of_several(shape, model, dtype):
    z, y, g = rows(shape[-1], model, shape[:-1], dtype)
    y[1] = IGNORED
    check(z, y, g, MODELS[model])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(2, 21, 5, 9), (1, WIDE, 4, 8), (2, WIDE + 1, 33)])
def test_maps_with_the_channels_first(shape, model, dtype):
    z, y, g = rows(shape[1], model, (shape[0], *shape[2:]), dtype)
    y[0, 1] = IGNORED
    z = z.movedim(-1, 1).contiguous().movedim(1, -1)
    assert choose_tile(z, rows_of(z)).axis == 0
    check(z, y, g, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_crop_with_more_axes_than_a_kernel_walks(model):
    z, y, g = rows(4, model, (3, 3, 3, 3, 3))
    whole = F.pad(z.movedim(-1, 0), (1, 1, 1, 0, 0, 1, 1, 1))
    crop = whole[:, :, 1:4, :3, 1:4, 1:4].movedim(0, -1)
    assert torch.equal(crop, z) and len(rows_of(crop).sizes) > cuda.AXES
    check(crop, y, g, MODELS[model])


@pytest.mark.parametrize(("shape", "strides", "tile"), [
    ((8192, 32000), None, Tile(1, LONG, 1)),
    ((128, 1000), None, Tile(2, 1024, 1)),
    ((8, 512, 512, 21), None, Tile(64, 32, 1)),
    ((8, 512, 512, 21), (21 * 2**18, 512, 1, 2**18), Tile(64, 32, 0)),
    ((8, 64, 64, 1000), (1000 * 2**12, 64, 1, 2**12), Tile(32, WIDE, 0)),
    ((8, 262144), None, Tile(1, LONG, 1, 64)),
    ((64, 128256), None, Tile(1, LONG, 1, 8)),
    ((1, 10), None, Tile(1, 16, 1)),
])  # fmt: skip
def test_the_launch_settings(shape, strides, tile):
    strides = strides or torch.empty(shape, device="meta").stride()
    z = torch.empty_strided(shape, strides, device="meta")
    assert choose_tile(z, rows_of(z)) == tile
    assert tile.rows * tile.classes <= max(TILE, LONG) and tile.splits <= PROGRAMS


GRADIENTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "the same along an axis": lambda g: g[:, :1].expand_as(g),
    "the same for all": lambda g: g[0, 0].expand_as(g),
}


@pytest.mark.parametrize("layout", GRADIENTS)
def test_labels_and_upstream_gradients_lie_anywhere_too(layout):
    z, y, g = rows(5, "logits", (3, 4))
    z = z.movedim(-1, 1).contiguous().movedim(1, -1)
    check(z, y.t().contiguous().t(), GRADIENTS[layout](g), None)


def test_more_classes_than_the_grid_has_places_for_narrow_tiles():
    z = torch.empty_strided((2, 9, 5_000_000), (45_000_000, 1, 9), device="meta")
    tile = choose_tile(z, rows_of(z))
    assert tile.axis == 0 and tile.classes * cuda.MOST >= 5_000_000


@pytest.mark.parametrize("tiles", [2, 5])
def test_classes_that_are_shut_out_may_fill_whole_tiles(tiles):
    """Minus infinity is the maximum there, and must not be subtracted from itself."""
    z, y, g = rows(tiles * LONG, "logits", (2,))
    z[:, :LONG], z[1, -LONG:], y[:] = -torch.inf, -torch.inf, LONG + 3
    assert (choose_tile(z, rows_of(z)).splits > 1) == (tiles == 5)
    check(z, y, g, None)


def test_the_bounds_of_probabilities_are_inclusive():
    low, high = clip = (0.25, 0.75)
    z = torch.tensor([[low, high, 0.5, 0.2, 0.8], [high, 0.1, low, 0.3, 1.0]])
    check(z, torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), clip)


@pytest.mark.parametrize("model", MODELS)
def test_rows_with_no_upstream_gradient_are_not_computed(model):
    z, y, g = rows(7, model)
    z[1, 2], g[1, 2], g[0, 0] = torch.nan, 0, 0
    loss, dz = loss_and_gradient(z, y, g, MODELS[model])
    assert loss[1, 2].isnan() and (dz[1, 2] == 0).all() and (dz[0, 0] == 0).all()
    assert (dz[0, 1] != 0).any()


@pytest.mark.parametrize("model", MODELS)
def test_the_entry_at_the_label_keeps_its_digits_where_the_loss_is_near_0(model):
    """p - 1 would have none of them: 1 - p is 1e-9."""
    z = (
        torch.tensor([[20.7, 0.0, -1.0]])
        if model == "logits"
        else torch.tensor([[0.9, 1e-7, 1e-7]])
    )
    y, g = torch.tensor([0]), torch.tensor([1.0])
    _, dz = loss_and_gradient(z, y, g, MODELS[model])
    exact = z.double().requires_grad_()
    (want,) = torch.autograd.grad(definition(exact, y, MODELS[model]), exact)
    assert dz[0, 0] != 0 and abs(dz[0, 0].item() / want[0, 0].item() - 1) < 4e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", [7, LONG + 1])
def test_every_element_is_written(classes, model):
    """Memory that is not written holds NaN here."""
    z, y, g = rows(classes, model, (2, 2))
    y[0], g[1, 0] = IGNORED, 0
    torch.use_deterministic_algorithms(True)
    try:
        loss, dz = loss_and_gradient(z, y, g, MODELS[model])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not loss.isnan().any() and not dz.isnan().any()


# One class; one block of the small tiles, and a class more; several blocks.
SMALL_TILES = {"TILE": 32, "LONG": 16, "WIDE": 4}
FEW_AND_MANY = (1, 16, 17, 50)
SMOOTHING = {"smoothed": 0.1, "as they are": 0.0}


@pytest.fixture
def small_tiles(monkeypatch):
    for name, value in SMALL_TILES.items():
        monkeypatch.setattr(cuda, name, value)


def rows_with_targets(shape, model, dtype=torch.float32, of=torch.float32):
    """Predictions, targets that do not add up to 1, and an upstream gradient."""
    z, _, g = rows(shape[-1], model, shape[:-1], dtype)
    t = torch.rand(shape, generator=torch.Generator(z.device).manual_seed(1)) * 3
    return z, t.to(of), g


def both_passes(g, given, needs=(True, True), kernels=cuda_targets) -> Any:
    """The losses, and dz and dt."""
    loss, saved = kernels.forward(*given)
    return loss, *kernels.backward(g, *given, needs, saved)


def check_targets(z, t, g, clip, smoothing=0.0, counted=None):
    """Both passes on z and t with their strides against the definition in float64."""
    needs = (True, t.is_floating_point())
    given = (counted, clip, smoothing)
    loss, dz, dt = both_passes(g, (z, t, *given), needs)
    want_z, want_t = targets.gradients(g.double(), z.double(), t.double(), *given)
    size = targets.losses(z.double(), t.double().abs(), *given)  # of the terms of a loss
    close(loss, targets.losses(z.double(), t.double(), *given), size.clamp(min=1))
    assert not ((loss == 0) & loss.signbit()).any()
    g = g.abs() if counted is None else g.abs() * counted
    close(dz, want_z.to(z.dtype), g.unsqueeze(-1) * steepest(z, t, clip, smoothing))
    assert dz.dtype == z.dtype and (dt is not None) == needs[1]
    if dt is not None:
        assert dt.dtype == t.dtype
        close(dt, want_t.to(t.dtype), torch.maximum(want_t.abs(), g.unsqueeze(-1)))


def steepest(z, t, clip, smoothing):
    """A bound of both terms of dz, whose difference may be nearly 0."""
    z = z.double()
    t = t.double().abs() * (1 - smoothing) + smoothing / z.shape[-1]
    if clip is None:
        return t.sum(-1, keepdim=True)
    s = z.sum(-1, keepdim=True)
    c = (z / s).clamp(*clip)
    return torch.where(c == z / s, t / c, 0).amax(-1, keepdim=True) / s


def close(got, want, size):
    """Eight roundings: of a sum, a quotient, an exponential or a logarithm, and some products."""
    assert torch.equal(got.isnan(), want.isnan())
    eps = max(torch.finfo(got.dtype).eps, 2**-23)
    assert ulps(got, want, size.nan_to_num() * eps / 2**-23) <= 8


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", FEW_AND_MANY)
def test_rows_with_targets(classes, model, smoothing, small_tiles):
    z, t, g = rows_with_targets((3, classes), model)
    check_targets(z, t - 1, g, MODELS[model], SMOOTHING[smoothing])


@pytest.mark.parametrize("model", MODELS)
def test_rows_with_targets_of_many_classes(model):
    z, t, g = rows_with_targets((2, LONG + 1), model)
    check_targets(z, t / LONG, g, MODELS[model])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of", [torch.float64, torch.float16, torch.bfloat16, torch.int64,
                                torch.uint8, torch.bool])  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
def test_targets_have_a_dtype_of_their_own(model, of, dtype):
    z, t, g = rows_with_targets((3, 7), model, dtype, of)
    check_targets(z, t, g, MODELS[model], SMOOTHING["smoothed"])


CHANNELS_FIRST = {
    "both": lambda z, t: (first(z), first(t)),
    "predictions": lambda z, t: (first(z), t),
    "targets": lambda z, t: (z, first(t)),
}


def first(x):
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("which", CHANNELS_FIRST)
@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (1, 3, 2, 9)])
def test_maps_with_targets_and_the_channels_first(shape, which, model, small_tiles):
    z, t, g = rows_with_targets(shape, model)
    counted = torch.arange(g.numel()).view(g.shape) % 4 != 1
    z, t = CHANNELS_FIRST[which](z, t)
    check_targets(z, t, g, MODELS[model], 0.0, counted)


@pytest.mark.parametrize("model", MODELS)
def test_rows_with_targets_may_have_gaps_between(model, small_tiles):
    z, t, g = rows_with_targets((3, 2, 17), model)
    gaps, wide = torch.full((6, 2, 34), torch.nan), torch.full((3, 4, 51), torch.nan)
    z, t = gaps[::2, :, ::2].copy_(z), wide[:, 1:3, 2::3].copy_(t)
    check_targets(z, t, g, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_crop_with_targets_and_more_axes_than_a_kernel_walks(model):
    z, t, g = rows_with_targets((2, 2, 2, 2, 3), model)
    whole = F.pad(z.movedim(-1, 0), (1, 1, 1, 0, 0, 1, 1, 1))
    crop = whole[:, 1:3, :2, 1:3, 1:3].movedim(0, -1)
    assert torch.equal(crop, z) and len(rows_of(crop).sizes) > cuda.AXES
    check_targets(crop, t, g, MODELS[model])
    check_targets(z, t[..., :1].expand_as(t), g, MODELS[model])


@pytest.mark.parametrize("layout", GRADIENTS)
def test_upstream_gradients_and_counts_of_targets_lie_anywhere_too(layout):
    z, t, g = rows_with_targets((3, 4, 5), "logits")
    counted = (torch.arange(12).view(4, 3) % 5 != 2).t()
    check_targets(z, t, GRADIENTS[layout](g), None, 0.0, counted)


@pytest.mark.parametrize("model", MODELS)
def test_rows_with_targets_that_do_not_count_may_hold_anything(model, small_tiles):
    z, t, g = rows_with_targets((4, 17), model)
    z[1], t[2], z[3, 5], g[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    check_targets(z, t, g, MODELS[model], 0.0, torch.arange(4) == 0)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("model", MODELS)
def test_a_gradient_of_targets_that_is_not_needed_is_none(model, needs):
    z, t, g = rows_with_targets((3, 7), model)
    given = (z, t, None, MODELS[model], 0.0)
    _, *both = both_passes(g, given)
    _, *found = both_passes(g, given, needs)
    for got, want, need in zip(found, both, needs, strict=True):
        assert torch.equal(got, want) if need else got is None


def check_rows_that_are_not_finite(z, t, g, clip):
    """They have no size to count roundings in: each is to be what `targets` has."""
    given = (z, t, None, clip, 0.0)
    found = both_passes(g, given)
    want = both_passes(g, given, kernels=targets)
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-6, atol=2e-6, equal_nan=True)
    return found[0]


BAD_LOGITS = {
    "shut out, with targets": [-torch.inf, 0.0, 1.0],
    "shut out, with a target of 0": [0.0, 1.0, -torch.inf],
    "all shut out": [-torch.inf] * 3,
    "least": [-3.4e38, 0.0, -3.4e38],
    "infinite": [0.0, torch.inf, 1.0],
    "no number": [torch.nan, 0.0, 1.0],
}


@pytest.mark.parametrize("place", [0, 14, 40])
@pytest.mark.parametrize("bad", BAD_LOGITS)
def test_logits_with_targets_may_be_anything(bad, place, small_tiles):
    """In the first block, across two, and in one that is not full."""
    z, t, g = rows_with_targets((3, 43), "logits")
    t[..., place + 2] = 0
    z[1, place : place + 3] = torch.tensor(BAD_LOGITS[bad])
    loss = check_rows_that_are_not_finite(z, t, g, None)
    assert loss[[0, 2]].isfinite().all()
    if bad in ("all shut out", "shut out, with a target of 0"):
        assert loss[1].isnan()


@pytest.mark.parametrize("offset", [-200.0, 200.0, 1e5])
def test_logits_with_targets_that_grow_from_block_to_block(offset, small_tiles):
    """The sums of the blocks before must be corrected for the larger maximum."""
    z, t, g = rows_with_targets((3, 50), "logits")
    z += torch.linspace(-30, 30, 50) + offset
    z[2] = z[2].flip(0)
    check_targets(z, t, g, None)
    z[:, :32], t[:, :32] = -torch.inf, 1
    loss = check_rows_that_are_not_finite(z, t, g, None)
    assert (loss == torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1.0, 2.0, 0.0])
def test_probabilities_with_targets_may_be_anything(bad, small_tiles):
    z, t, g = rows_with_targets((4, 17), "probabilities")
    z[1, 16], z[2, 0], z[3], t[2] = bad, bad, bad, 0
    check_rows_that_are_not_finite(z, t, g, MODELS["probabilities"])


def test_the_bounds_of_probabilities_with_targets_are_inclusive():
    z = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.5, 0.25], [0.125, 0.75, 0.125]]) * 4
    _, t, g = rows_with_targets((3, 3), "probabilities")
    check_targets(z, t, g, (0.25, 0.75))


def test_probabilities_with_targets_that_are_all_clipped_have_no_gradient():
    """Not even for an upstream NaN; but where a sum is 0 there are no probabilities."""
    z = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.0]])
    t, g = torch.eye(3)[[2, 2, 0]], torch.full((3,), torch.nan)
    check_rows_that_are_not_finite(z, t, g, MODELS["probabilities"])
    given = (z, t, None, MODELS["probabilities"], 0.0)
    _, dz, _ = both_passes(g, given)
    assert (dz[0] == 0).all() and dz[1:].isnan().all()


@pytest.mark.parametrize("model", MODELS)
def test_every_element_of_rows_with_targets_is_written(model, small_tiles):
    """Memory that is not written holds NaN here."""
    z, t, g = rows_with_targets((3, 17), model)
    given = (z, t, torch.arange(3) != 1, MODELS[model], 0.0)
    torch.use_deterministic_algorithms(True)
    try:
        found = both_passes(g, given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 5)])
def test_losses_of_targets_take_the_kernels(shape, model, monkeypatch):
    monkeypatch.setattr(kernels, "kernels_for", lambda z: cuda)
    for name in ("forward", "backward"):
        monkeypatch.setattr(targets, name, None)
    z, t, g = rows_with_targets(shape, model)
    z.requires_grad_()
    t.requires_grad_()
    loss = kernels.target_losses(z, t, None, MODELS[model])
    want = targets.losses(z, t, None, MODELS[model], 0.0)
    torch.testing.assert_close(loss, want)
    found = torch.autograd.grad(loss, (z, t), g, retain_graph=True)
    again = torch.autograd.grad(loss, (z, t), g, create_graph=True)
    for got, same, right in zip(found, again, torch.autograd.grad(want, (z, t), g), strict=True):
        torch.testing.assert_close(got, right)
        torch.testing.assert_close(same, right)


def test_targets_that_triton_may_not_read_take_any_device_s_path(monkeypatch):
    monkeypatch.setattr(kernels, "kernels_for", lambda z: cuda)
    z = torch.zeros(3, 5)
    assert kernels.target_kernels(z, z.half()) is cuda_targets
    assert kernels.target_kernels(z, z.bool()) is cuda_targets
    assert kernels.target_kernels(z, z.to(torch.float8_e4m3fn)) is targets


def smoothed_rows(shape, model):
    """Predictions, labels, those as targets, an upstream gradient, and which rows count."""
    z, _, g = rows(shape[-1], model, shape[:-1])
    y = torch.arange(g.numel()).view(g.shape) % shape[-1]
    counted = torch.ones_like(y, dtype=torch.bool)
    counted[0], y[0], z[0] = False, -1, torch.nan
    return z, y, torch.nn.functional.one_hot(y.clamp(0), shape[-1]), g, counted


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, first])
@pytest.mark.parametrize("classes", FEW_AND_MANY)
def test_smoothed_labels_have_the_bits_of_one_hot_targets(classes, layout, model, small_tiles):
    z, y, hot, g, counted = smoothed_rows((2, 3, 2, classes), model)
    options, needs = (counted, MODELS[model], 0.1), (True, False)
    loss, dz, _ = both_passes(g, (layout(z), y, *options), needs)
    want, want_dz, _ = both_passes(g, (layout(z), hot, *options), needs)
    assert torch.equal(loss, want) and torch.equal(dz, want_dz)
    assert (loss[0] == 0).all() and not loss.isnan().any() and not dz.isnan().any()


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_smoothed_labels_may_be_written_over_their_predictions(model, small_tiles):
    z, y, _, g, counted = smoothed_rows((5, 50), model)
    module, given = SmoothedLabels(cuda_targets, 0.1), (y, counted, MODELS[model])
    _, saved = module.forward(z, *given)
    want = module.backward(g, z, *given, saved)
    assert torch.equal(module.backward(g, z, *given, saved, z), want)


@pytest.mark.parametrize("model", MODELS)
def test_a_smoothed_label_that_is_no_class_poisons_its_row(model):
    z, y, g = rows(7, model, (4,))
    y[1], y[3] = 7, -1
    loss, dz, _ = both_passes(g, (z, y, None, MODELS[model], 0.1), (True, False))
    poisoned = torch.tensor([False, True, False, True])
    assert torch.equal(loss.isnan(), poisoned) and torch.equal(dz.isnan().all(-1), poisoned)
    assert torch.equal(dz.isnan().any(-1), poisoned)
