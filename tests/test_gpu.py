"""What only a GPU can show: asynchrony, determinism, no lost context, no limit at 2^31."""

import pytest
import torch
from benchmark.measuring import cuda_peak
from test_kernels import MODELS, rows

from torch_sce import CategoricalCrossentropy, SparseCategoricalCrossentropy, metrics
from torch_sce.kernels import _cuda_kernels, cuda


def batch(classes=1000, model="logits", dtype=torch.bfloat16):
    z, y, g = rows(classes, model, (64,), dtype)
    y[3] = -1
    return z.requires_grad_(), y, g


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "none"])
def test_nothing_waits_for_the_device(from_logits, reduction):
    z, y, g = batch(model="logits" if from_logits else "probabilities")
    loss = SparseCategoricalCrossentropy(from_logits, ignore_class=-1, reduction=reduction)
    mask, weight = y != 5, g.abs()
    loss(y, z, weight, mask).sum().backward()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss(y, z, weight, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("from_logits", [True, False])
def test_neither_targets_nor_metrics_wait(from_logits):
    z, y, g = batch(model="logits" if from_logits else "probabilities")
    y = y.clamp(min=0)
    t = torch.eye(1000)[y].requires_grad_()
    loss = CategoricalCrossentropy(from_logits, 0.1)
    found = [getattr(metrics, name)().to("cuda") for name in metrics.__all__]

    def step():
        loss(t, z, g.abs(), y != 5).backward()
        for metric in found:
            labels = y if metric.name.startswith("sparse") else t
            y_pred = z.argmax(-1) if metric.name == "accuracy" else z
            metric.update_state(y if metric.name == "accuracy" else labels, y_pred, g.abs(), y != 5)
            metric.result()

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("from_logits", [True, False])
def test_targets_take_the_gradient_and_few_numbers_a_row(from_logits):
    z = torch.rand(4096, 32000, dtype=torch.bfloat16).softmax(-1).requires_grad_()
    t = torch.rand_like(z).detach()
    loss = CategoricalCrossentropy(from_logits)
    torch.autograd.grad(loss(t, z), z)  # compiles
    peak = cuda_peak(lambda: torch.autograd.grad(loss(t, z), z), "cuda")
    assert peak < 1.02 * z.nbytes


@pytest.mark.parametrize("model", MODELS)
def test_both_passes_go_into_a_graph(model):
    z, y, _ = batch(model=model)
    loss = SparseCategoricalCrossentropy(model == "logits", ignore_class=-1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(y, z), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(y, z)
        (gradient,) = torch.autograd.grad(value, z)
    with torch.no_grad():
        z.copy_(z.flip(0))
        y.copy_(y.flip(0))
    graph.replay()
    want = loss(y, z)
    assert torch.equal(value, want)
    assert torch.equal(gradient, torch.autograd.grad(want, z)[0])


def test_a_label_that_is_no_class_leaves_the_context_alive():
    z, y, _ = batch()
    y[7], y[9] = 1000, -5
    loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction="none")
    losses = loss(y, z)
    (dz,) = torch.autograd.grad(losses.sum(), z)
    poisoned = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor([7, 9]), True)
    assert torch.equal(losses.isnan(), poisoned) and torch.equal(dz.isnan().all(1), poisoned)
    assert torch.equal(dz.isnan().any(1), poisoned)
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [(64, 1000), (8, 262144), (70000, 21)])
@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits_twice(model, shape):
    z, y, g = rows(shape[1], model, shape[:1])
    results = []
    for _ in range(3):
        given = (z, y, None, MODELS[model])
        loss, saved = cuda.forward(*given)
        results.append((loss, cuda.backward(g, *given, saved)))
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("channels_first", [False, True])
def test_more_than_2_to_the_31_elements(channels_first):
    """The rows at both ends are those of a small tensor."""
    shape, part = (65537, 32768), slice(-3, None)
    z = torch.zeros(shape, dtype=torch.float16)
    ends, y, _ = rows(32768, "logits", (6,), torch.float16)
    z[:3], z[part] = ends[:3], ends[3:]
    labels = torch.cat([y[:3], torch.zeros(65531, dtype=torch.int64), y[3:]])
    if channels_first:
        z = z.t().contiguous().t()
    g = torch.ones(65537)
    loss, saved = cuda.forward(z, labels, None, None)
    small, small_saved = cuda.forward(ends, y, None, None)
    torch.testing.assert_close(torch.cat([loss[:3], loss[part]]), small, rtol=1e-6, atol=1e-6)
    dz = cuda.backward(g, z, labels, None, None, saved)
    small_dz = cuda.backward(g[:6], ends, y, None, None, small_saved)
    torch.testing.assert_close(torch.cat([dz[:3], dz[part]]), small_dz, rtol=1e-3, atol=1e-7)


def test_memory_is_the_gradient_and_few_numbers_a_row():
    z = torch.randn(4096, 32000, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, 32000, (4096,))
    loss = SparseCategoricalCrossentropy(from_logits=True)
    torch.autograd.grad(loss(y, z), z)  # compiles
    peak = cuda_peak(lambda: torch.autograd.grad(loss(y, z), z), "cuda")
    assert peak < 1.02 * z.nbytes


def test_triton_is_what_runs_here():
    assert _cuda_kernels(torch.device("cuda", 0)) is cuda
