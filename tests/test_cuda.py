"""Triton's kernels: what they do beyond `test_kernels.py`, on a GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from test_kernels import MODELS, rows
from ulps import ulps

from torch_sce.kernels import IGNORED, aten, cuda
from torch_sce.kernels.cuda import LONG, PROGRAMS, TILE, WIDE, Tile, choose_tile


def check(z, y, g, clip):
    """Both passes on z as it lies in memory against the definition in float64."""
    loss, *summary = cuda.forward(z, y, clip, False)
    dz = cuda.backward(g, z, y, clip, False, *summary)
    exact = z.double().requires_grad_()
    definition = aten.row_losses(exact, y, clip)
    (want,) = torch.autograd.grad(definition, exact, g.double())
    assert dz.dtype == z.dtype and dz.shape == z.shape
    assert ulps(loss, definition, definition.detach().abs().clamp(min=1)) <= 6
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
    assert choose_tile(z, cuda._rows(z)).axis == 0
    check(z, y, g, MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_crop_with_more_axes_than_a_kernel_walks(model):
    z, y, g = rows(4, model, (3, 3, 3, 3, 3))
    whole = F.pad(z.movedim(-1, 0), (1, 1, 1, 0, 0, 1, 1, 1))
    crop = whole[:, :, 1:4, :3, 1:4, 1:4].movedim(0, -1)
    assert torch.equal(crop, z) and len(cuda._rows(crop).sizes) > cuda.AXES
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
    assert choose_tile(z, cuda._rows(z)) == tile
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
    tile = choose_tile(z, cuda._rows(z))
    assert tile.axis == 0 and tile.classes * cuda.MOST >= 5_000_000


@pytest.mark.parametrize("tiles", [2, 5])
def test_classes_that_are_shut_out_may_fill_whole_tiles(tiles):
    """Minus infinity is the maximum there, and is not to be taken off itself."""
    z, y, g = rows(tiles * LONG, "logits", (2,))
    z[:, :LONG], z[1, -LONG:], y[:] = -torch.inf, -torch.inf, LONG + 3
    assert (choose_tile(z, cuda._rows(z)).splits > 1) == (tiles == 5)
    check(z, y, g, None)


def test_the_bounds_of_probabilities_are_inclusive():
    low, high = clip = (0.25, 0.75)
    z = torch.tensor([[low, high, 0.5, 0.2, 0.8], [high, 0.1, low, 0.3, 1.0]])
    check(z, torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), clip)


@pytest.mark.parametrize("model", MODELS)
def test_rows_with_no_upstream_gradient_are_not_computed(model):
    z, y, g = rows(7, model)
    z[1, 2], g[1, 2], g[0, 0] = torch.nan, 0, 0
    loss, *summary = cuda.forward(z, y, MODELS[model], False)
    dz = cuda.backward(g, z, y, MODELS[model], False, *summary)
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
    _, *summary = cuda.forward(z, y, MODELS[model], False)
    dz = cuda.backward(g, z, y, MODELS[model], False, *summary)
    exact = z.double().requires_grad_()
    (want,) = torch.autograd.grad(aten.row_losses(exact, y, MODELS[model]), exact)
    assert dz[0, 0] != 0 and abs(dz[0, 0].item() / want[0, 0].item() - 1) < 4e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", [7, LONG + 1])
def test_every_element_is_written(classes, model):
    """Memory that is not written holds NaN here."""
    z, y, g = rows(classes, model, (2, 2))
    y[0], g[1, 0] = IGNORED, 0
    torch.use_deterministic_algorithms(True)
    try:
        loss, *summary = cuda.forward(z, y, MODELS[model], False)
        dz = cuda.backward(g, z, y, MODELS[model], False, *summary)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not loss.isnan().any() and not dz.isnan().any()
