"""Tensors that are not plain, and calls that are not eager: which path each takes.

The kernels read values and write into memory of their own. That is for plain, dense tensors
without active modes or transforms; all others use PyTorch's operations. Sizes are below every
threshold of the package and above, and results are compared with the definition in float64.
"""

# pyright: reportPrivateImportUsage=false

import multiprocessing.pool
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from ulps import ulps

from torch_sce import (
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    sparse_categorical_accuracy,
    sparse_categorical_crossentropy,
)
from torch_sce.kernels import aten, cpu, cpu_targets, native, targets
from torch_sce.options import Reduction
from torch_sce.samples import CLIP

pytestmark = pytest.mark.skipif("torch.get_default_device().type != 'cpu'")

# A block of few classes, many of them, and long rows.
SIZES = {"small": (6, 7), "large": (3300, 40), "long": (520, 512)}
MODELS = ("logits", "probabilities", "targets, logits", "targets, probabilities")

# Where the work is done: the definitions, and the kernels of a CPU tensor.
LABELS, TARGETS = (cpu, cpu_targets) if native else (aten, targets)
WORK = {(aten, "row_losses"), (targets, "losses")} | {
    (module, name) for module in (LABELS, TARGETS) for name in ("forward", "backward")
}
BACKWARD = {f"{module.__name__.split('.')[-1]}.backward" for module in (LABELS, TARGETS)}
definition, definition_of_targets = aten.row_losses, targets.losses


def path_of(model, size, plain=False):
    """The path of plain tensors, or that of others: the plain operations."""
    of_targets = model.startswith("targets")
    if plain:
        return {"targets.losses" if of_targets else "aten.row_losses"}
    kernels = (TARGETS if of_targets else LABELS).__name__.split(".")[-1]
    return {f"{kernels}.forward", f"{kernels}.backward"}


@pytest.fixture
def path(monkeypatch):
    """The functions that have done the work so far, each with its module."""
    taken = set()

    def spy(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            taken.add(f"{module.__name__.split('.')[-1]}.{name}")
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in WORK:
        spy(module, name)
    return taken


class Problem:
    """Predictions z, labels or targets y, which of them count, and an upstream gradient g."""

    def __init__(self, model, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        *shape, classes = SIZES[size]
        self.model, self.sparse = model, not model.startswith("targets")
        self.from_logits = model.endswith("logits")
        self.z = torch.randn(*shape, classes, generator=generator) * 2
        self.y = torch.randint(classes, shape, generator=generator)
        self.counted = torch.rand(shape, generator=generator) < 0.8
        self.g = torch.randn(shape, generator=generator)
        if self.sparse:
            self.y = self.y.where(self.counted, -1)
        else:
            self.y = torch.randn(*shape, classes, generator=generator).softmax(-1)
        if not self.from_logits:
            self.z = self.z.softmax(-1)

    @property
    def given(self):
        return self.z, self.y, self.counted

    def loss(self, reduction: Reduction = "none"):
        if self.sparse:
            return SparseCategoricalCrossentropy(self.from_logits, -1, reduction)
        return CategoricalCrossentropy(self.from_logits, reduction=reduction)

    def losses(self, z, y=None, mask=None, reduction: Reduction = "none"):
        """The losses of z by the module; positions that do not count by label, or by mask."""
        y = self.y if y is None else y
        if mask is None and not self.sparse:
            mask = self.counted
        return self.loss(reduction)(y, z, mask=mask)

    def defined(self, z):
        clip = None if self.from_logits else CLIP[torch.float32]
        if self.sparse:
            return definition(z, self.y, self.counted, clip)
        return definition_of_targets(z, self.y.to(z.dtype), self.counted, clip, 0.0)

    def check(self, z, losses, dz, g=None):
        """That these are the losses and the gradient of z.

        A loss is a sum of up to `LONG` terms, a gradient a difference of such sums: over whole
        rows their errors stay within a few units of the largest entry, or of g times it.
        """
        exact, g = z.detach().double().requires_grad_(), self.g if g is None else g
        want = self.defined(exact)
        (slope,) = torch.autograd.grad(want, exact, g.double())
        want, scale = want.detach(), slope.abs().amax(-1, keepdim=True)
        assert ulps(losses, want, want.abs().clamp(min=1)) <= 8
        assert ulps(dz, slope, scale.maximum(g.abs().unsqueeze(-1))) <= 16


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture
def problem(model, size):
    return Problem(model, size)


def differentiated(problem, leaf, **arguments):
    losses = problem.losses(leaf, **arguments)
    (dz,) = torch.autograd.grad(losses, leaf, problem.g)
    return losses, dz


class Labelled(torch.Tensor):
    """A subclass with nothing of its own, as data sets and image libraries have them."""


class Counting(torch.Tensor):
    """A subclass that sees the functions it is passed to."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Logging(torch.Tensor):
    """A wrapper subclass, which has no memory of its own and sees the operators."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, cls) else x

        found = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, found)


def conjugate(z):
    return torch.complex(torch.zeros_like(z), -z).conj().imag


def memory_of(x):
    """The plain tensor in one of those above."""
    if isinstance(x, TwoTensor):
        assert torch.equal(x.a, x.b)
        return x.a
    if isinstance(x, Logging):
        return x.inner
    if torch._is_functional_tensor(x):
        return torch._from_functional_tensor(x)
    return x.detach().as_subclass(torch.Tensor)


PLAIN = {
    "a tensor": lambda z: z,
    "a parameter": nn.Parameter,
    "a buffer": nn.Buffer,
    "in shared memory": lambda z: z.share_memory_(),
    "from NumPy": lambda z: torch.from_numpy(z.numpy()),
    "one row for all": lambda z: z[:1].expand_as(z),
    "overlapping rows": lambda z: z.flatten().as_strided(z.shape, (1, 1)),
    "a negative view": lambda z: torch._neg_view(-z),
    "a conjugate's part": conjugate,
    "every other": lambda z: torch.stack([z, z + 1], -1)[..., 0],
    "class axis first": lambda z: z.T.contiguous().T,
}
OTHERS = {
    "a subclass": lambda z: z.as_subclass(Labelled),
    "one that sees functions": lambda z: z.as_subclass(Counting),
    "one that sees operators": Logging,
    "two tensors": lambda z: TwoTensor(z, z.clone()),
    "functional": torch._to_functional_tensor,
}
WRAPPERS = ("one that sees operators", "two tensors")


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors_take_the_kernels_wherever_their_memory_is(kind, problem, model, size, path):
    leaf = PLAIN[kind](problem.z).detach().requires_grad_()
    before = leaf.detach().clone()
    losses, dz = differentiated(problem, leaf)
    assert path == path_of(model, size)
    problem.check(before, losses, dz)
    assert torch.equal(leaf.detach(), before) and type(losses) is type(dz) is torch.Tensor


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tensors_take_the_plain_operations(kind, problem, model, size, path):
    leaf = OTHERS[kind](problem.z).requires_grad_()
    losses = problem.losses(leaf)
    losses.backward(problem.g)
    assert path == path_of(model, size, plain=True)
    assert type(losses) is type(leaf)
    assert type(leaf.grad) is (type(leaf) if kind in WRAPPERS else torch.Tensor)  # as PyTorch does
    assert torch._is_functional_tensor(leaf.grad) == torch._is_functional_tensor(leaf)
    problem.check(problem.z, memory_of(losses), memory_of(leaf.grad))


@pytest.mark.parametrize("kind", ["a subclass", "two tensors", "functional"])
@pytest.mark.parametrize("which", ["labels", "masks"])
def test_other_labels_and_masks_take_the_plain_operations(which, kind, problem, model, size, path):
    wrap, leaf = OTHERS[kind], problem.z.requires_grad_()
    y, mask = problem.y, problem.counted
    y, mask = (wrap(y), mask) if which == "labels" else (y, wrap(mask))
    losses = problem.losses(leaf, y, mask)
    losses.backward(wrap(problem.g))
    assert path == path_of(model, size, plain=True)
    problem.check(problem.z, memory_of(losses), memory_of(leaf.grad))


@pytest.mark.parametrize("kind", [*WRAPPERS, "functional"])
def test_an_upstream_gradient_of_another_kind_takes_the_plain_operations(kind, problem, path):
    leaf = problem.z.requires_grad_()
    losses = problem.losses(leaf)
    (dz,) = torch.autograd.grad(losses, leaf, OTHERS[kind](problem.g))
    assert not path & BACKWARD
    problem.check(problem.z, losses, memory_of(dz))


@pytest.mark.parametrize("change", [torch._neg_view, lambda g: g[:1].expand_as(g), conjugate])
def test_an_upstream_gradient_may_lie_anywhere(change, problem, model, size, path):
    leaf, g = problem.z.requires_grad_(), change(problem.g)
    losses = problem.losses(leaf)
    (dz,) = torch.autograd.grad(losses, leaf, g)
    assert path == path_of(model, size)
    problem.check(problem.z, losses, dz, g.clone())


@pytest.mark.filterwarnings("ignore::UserWarning")  # a prototype
def test_masked_tensors_are_refused(problem):
    z = torch.masked.masked_tensor(problem.z, problem.z < 9)
    with pytest.raises(TypeError):
        problem.losses(z)


@pytest.mark.parametrize("shape", [(0, 7), (0, 512), (3, 0, 7)])
def test_no_positions_have_no_losses(shape, model):
    z = torch.empty(shape, requires_grad=True)
    y = torch.empty(shape if model.startswith("targets") else shape[:-1], dtype=torch.int64)
    kind = CategoricalCrossentropy if model.startswith("targets") else SparseCategoricalCrossentropy
    losses = kind(model.endswith("logits"), reduction="none")(y, z)
    losses.sum().backward()
    assert losses.shape == shape[:-1] and z.grad is not None and z.grad.shape == shape


class Names(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class TestModes:
    """What watches or replaces operators."""

    def test_meta_tensors_have_shapes(self, problem, model, size, path):
        leaf = problem.z.to("meta").requires_grad_()
        losses = problem.losses(leaf, problem.y.to("meta"), problem.counted.to("meta"))
        losses.sum().backward()
        assert path == path_of(model, size, plain=True)
        assert losses.is_meta and losses.shape == problem.g.shape and losses.dtype == torch.float32
        assert leaf.grad is not None and leaf.grad.is_meta and leaf.grad.shape == leaf.shape

    def test_fake_tensors_have_shapes(self, problem, model, size, path):
        with FakeTensorMode() as mode:
            given = (problem.z.requires_grad_(), problem.y, problem.counted)
            leaf, y, mask = map(mode.from_tensor, given)
            losses = problem.losses(leaf, y, mask)
            losses.sum().backward()
        assert path == path_of(model, size, plain=True)
        assert losses.shape == problem.g.shape and losses.dtype == torch.float32
        assert type(leaf.grad) is FakeTensor and leaf.grad.shape == leaf.shape

    def test_a_dispatch_mode_sees_operators(self, problem, model, size, path):
        leaf = problem.z.requires_grad_()
        with Names() as mode:
            losses, dz = differentiated(problem, leaf)
        assert path == path_of(model, size, plain=True)
        assert mode.seen & {"log", "_log_softmax"}
        problem.check(problem.z, losses, dz)

    def test_a_mode_in_the_backward_pass_alone_sees_operators(self, problem, path):
        leaf = problem.z.requires_grad_()
        losses = problem.losses(leaf)
        with Names():
            (dz,) = torch.autograd.grad(losses, leaf, problem.g)
        assert not path & BACKWARD
        problem.check(problem.z, losses, dz)

    @pytest.mark.parametrize("pre_dispatch", [False, True])
    def test_a_traced_graph_serves_other_values(self, pre_dispatch, model, size, path):
        """No value has been read on the way."""
        problem, other = Problem(model, size), Problem(model, size, seed=1)

        def losses(z, y, mask):
            return problem.losses(z, y, mask)

        graph = make_fx(losses, tracing_mode="symbolic", pre_dispatch=pre_dispatch)(*problem.given)
        assert path == path_of(model, size, plain=True)
        self.check_other_values(graph, other)

    # In torch 2.13 and 2.15 it says that it is deprecated; and of each size, that it is fixed.
    @pytest.mark.filterwarnings("ignore:`?torch.jit")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_a_script_by_tracing_serves_other_values(self, model, size, path):
        problem, other = Problem(model, size), Problem(model, size, seed=1)
        script = torch.jit.trace(problem.losses, problem.given, check_trace=False)
        assert path == path_of(model, size, plain=True)
        self.check_other_values(script, other)

    def check_other_values(self, call, problem):
        if problem.from_logits:
            problem.z *= 50
        z, y, mask = problem.given
        leaf = z.clone().requires_grad_()
        losses = call(leaf, y, mask)
        (dz,) = torch.autograd.grad(losses, leaf, problem.g)
        problem.check(z, losses, dz)


class TestCompiler:
    """Compiled or exported, no size and no option may choose a path."""

    @pytest.fixture(autouse=True)
    def afresh(self):
        torch.compiler.reset()

    @pytest.mark.parametrize("from_logits", [True, False])
    def test_targets_compile_once_for_all_sizes(self, from_logits):
        graphs = []

        def count(graph, _inputs):
            graphs.append(graph)
            return graph.forward

        loss = CategoricalCrossentropy(from_logits)
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
        for rows in (6, 3300, 7):
            z, t = torch.rand(2, rows, 40).requires_grad_()
            torch.testing.assert_close(compiled(t, z), loss(t, z), rtol=1e-5, atol=0)
        assert len(graphs) == 1

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("model", MODELS)
    def test_it_exports_with_any_batch(self, model, strict):
        class Step(nn.Module):
            def __init__(self):
                super().__init__()
                self.loss = loss

            def forward(self, z, y):
                return self.loss(y, z)

        loss, batch = Problem(model, "small").loss(), torch.export.Dim("batch", min=2)
        problem = Problem(model, "large")
        z, y = problem.z, problem.y
        exported = torch.export.export(
            Step(), (z[:3], y[:3]), dynamic_shapes={"z": {0: batch}, "y": {0: batch}}, strict=strict
        )
        torch.testing.assert_close(exported.module()(z, y), loss(y, z), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("ignore_class", [1.0, 1.5, torch.nan])
    def test_a_class_to_ignore_may_be_a_float(self, ignore_class):
        loss = SparseCategoricalCrossentropy(ignore_class=ignore_class, reduction="none")
        y, z = torch.tensor([0, 1, 2]), torch.rand(3, 300)
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
        found = compiled(y, z)
        torch.testing.assert_close(found, loss(y, z))
        assert (found == 0).tolist() == [label == ignore_class for label in y.tolist()]

        def function(y, z, ignored):
            return sparse_categorical_crossentropy(y, z, ignore_class=ignored)

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(y, z, ignore_class), found)


class TestTransforms:
    """torch.func, whose tensors have no values either."""

    def test_grad_and_functionalize(self, problem, model, size, path):
        def total(z):
            losses = problem.losses(z)
            return (losses * problem.g).sum(), losses

        transform = torch.func.grad(total, has_aux=True)
        for call in (transform, torch.func.functionalize(transform)):
            dz, losses = call(problem.z)
            assert path == path_of(model, size, plain=True)
            problem.check(problem.z, losses, dz)

    def test_vmap_over_positions_and_of_gradients(self, problem, model, size, path):
        def loss(z, y, counted):
            losses = problem.losses(z[None], y[None], counted[None])
            return losses.sum(), losses[0]

        each = torch.func.vmap(torch.func.grad(loss, has_aux=True))
        dz, losses = each(problem.z, problem.y, problem.counted)
        assert path == path_of(model, size, plain=True)
        problem.check(problem.z, losses, dz, torch.ones_like(problem.g))

    def test_jvp_and_forward_mode(self, problem, model, size, path):
        """The tangent is v dz, summed over classes."""
        v = torch.randn(problem.z.shape, generator=torch.Generator().manual_seed(2)) * problem.z
        losses, tangent = torch.func.jvp(problem.losses, (problem.z,), (v,))[:2]
        with torch.autograd.forward_ad.dual_level():
            dual = problem.losses(torch.autograd.forward_ad.make_dual(problem.z, v))
            found = torch.autograd.forward_ad.unpack_dual(dual)
        assert path == path_of(model, size, plain=True)
        exact = problem.z.double().requires_grad_()
        (slope,) = torch.autograd.grad(problem.defined(exact).sum(), exact)
        terms = slope * v
        bound = terms.abs().sum(-1).clamp(min=1) * 2**-20  # a few roundings of each term
        for each in (tangent, found.tangent):
            assert ((each - terms.sum(-1)).abs() <= bound).all()
        assert torch.equal(losses, found.primal)

    def test_many_upstream_gradients_at_once(self, problem, path):
        leaf = problem.z.requires_grad_()
        losses = problem.losses(leaf)
        many = torch.stack([problem.g, -problem.g])
        (dz,) = torch.autograd.grad(losses, leaf, many, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda g: torch.autograd.grad(losses, leaf, g))(many)
        assert not path & BACKWARD
        for found in (dz, *mapped):
            problem.check(problem.z, losses, found[0])
            assert torch.equal(found[0], -found[1])


class TestInference:
    def test_predictions_and_calls_in_inference_mode(self, problem, model, size, path):
        want = problem.losses(problem.z)
        path.clear()
        with torch.inference_mode():
            z, y, mask = problem.z * 1, problem.y * 1, problem.counted & True
            inside = problem.losses(z, y, mask)
        outside = problem.losses(z, y, mask)
        assert path == path_of(model, size) - BACKWARD
        assert torch.equal(inside, want) and torch.equal(outside, want)
        assert inside.is_inference() and not outside.requires_grad

    def test_labels_from_inference_mode_cannot_be_trained_on(self, size):
        """As in PyTorch's own losses, and with its advice."""
        problem = Problem("logits", size)
        with torch.inference_mode():
            y = problem.y.clamp(min=0)
        leaf, loss = problem.z.requires_grad_(), SparseCategoricalCrossentropy(from_logits=True)
        for call in (loss, lambda y, z: nn.functional.cross_entropy(z, y)):
            with pytest.raises(RuntimeError, match="make a clone"):
                call(y, leaf)
            call(y.clone(), leaf).backward()


class TestHooks:
    """What is saved for the backward pass may come back as something else."""

    @pytest.mark.parametrize("unpack", [
        torch.clone, lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        lambda x: torch.stack([x, x], -1)[..., 0],
    ])  # fmt: skip
    def test_saved_tensors_may_come_back_as_new_ones(self, unpack, problem, model, size, path):
        leaf = problem.z.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
            losses, dz = differentiated(problem, leaf)
        assert path == path_of(model, size)
        problem.check(problem.z, losses, dz)

    def test_saved_tensors_may_be_kept_elsewhere(self, problem, model, size, path):
        leaf = problem.z.requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            losses, dz = differentiated(problem, leaf)
        assert path == path_of(model, size)
        problem.check(problem.z, losses, dz)

    def test_saved_tensors_that_come_back_as_a_subclass(self, problem, path):
        leaf = problem.z.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, OTHERS["two tensors"]):
            losses, dz = differentiated(problem, leaf)
        assert not path & BACKWARD
        problem.check(problem.z, losses, memory_of(dz))

    def test_checkpoints_compute_the_same_again(self, problem, model, size, path):
        leaf = problem.z.requires_grad_()
        losses = torch.utils.checkpoint.checkpoint(problem.losses, leaf, use_reentrant=False)
        (dz,) = torch.autograd.grad(losses, leaf, problem.g)
        assert path == path_of(model, size)
        problem.check(problem.z, losses, dz)


class TestDefaults:
    """Global settings that must not affect a loss."""

    def results(self, problem):
        leaf = problem.z.clone().requires_grad_()
        losses, dz = differentiated(problem, leaf)
        return losses.detach(), dz

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_default_dtype_changes_no_bit(self, dtype, problem, model, size, path):
        want = self.results(problem)
        torch.set_default_dtype(dtype)
        try:
            found = self.results(problem)
        finally:
            torch.set_default_dtype(torch.float32)
        assert path == path_of(model, size)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    def test_the_default_device_changes_no_bit(self, problem, model, size, path):
        want = self.results(problem)
        with torch.device("meta"):
            found = self.results(problem)
        assert path == path_of(model, size)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    def test_lists_go_to_the_predictions_device_or_the_default_one(self):
        loss = SparseCategoricalCrossentropy()
        rows = [[0.1, 0.9], [0.6, 0.4]]
        want = loss([0, 1], rows, [1.0, 2.0], [True, False])
        with torch.device("meta"):
            assert loss([0, 1], rows, [1.0, 2.0], 1).device.type == "meta"
            z = torch.tensor(rows, device="cpu")
            found = loss([0, 1], z, np.array([1.0, 2.0]), (True, False))
            right = sparse_categorical_accuracy([0, 1], z)
        assert torch.equal(found, want) and right.tolist() == [0, 0]

    def test_fresh_memory_may_hold_anything(self, problem, model, size, path):
        """Deterministic algorithms fill it with NaN: each element has to be written."""
        want = self.results(problem)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
            found = self.results(problem)
        finally:
            torch.use_deterministic_algorithms(False)
        assert path == path_of(model, size)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def run_python(program):
    """A process of its own, which finds the package and the tests."""
    call = [sys.executable, "-c", "import sys; sys.path.append('tests')" + textwrap.dedent(program)]
    subprocess.run(call, cwd=Path(__file__).parents[1], check=True, timeout=90)


class TestProcesses:
    def test_threads_do_not_disturb_each_other(self, model, size):
        problems = [Problem(model, size, seed) for seed in range(4)]
        shared = problems[0].z.clone().requires_grad_()

        def work(problem):
            leaf = problem.z.clone().requires_grad_()
            return differentiated(problem, leaf), differentiated(problems[0], shared)

        with multiprocessing.pool.ThreadPool(8) as pool:
            found = pool.map(work, problems * 2, chunksize=1)
        for problem, (own, common) in zip(problems * 2, found, strict=True):
            problem.check(problem.z, *own)
            problems[0].check(problems[0].z, *common)

    @pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
    def test_a_fork_after_a_call_computes_the_same(self):
        """On one thread, as in a worker of a DataLoader: PyTorch's own operations hang on more."""
        run_python("""
            import os, signal, torch
            from test_tensor_kinds import MODELS, SIZES, Problem, differentiated

            torch.set_num_threads(2)
            problems = [Problem(model, size) for model in MODELS for size in SIZES]
            for problem in problems:
                differentiated(problem, problem.z.requires_grad_())
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                torch.set_num_threads(1)
                for problem in problems:
                    problem.check(problem.z, *differentiated(problem, problem.z))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """)

    def test_it_can_be_imported_under_another_default_device(self):
        run_python("""
            import torch
            torch.set_default_device("meta")
            torch.set_default_dtype(torch.float64)
            import torch_sce
            losses = torch_sce.sparse_categorical_crossentropy([1], [[0.1, 0.9]])
            assert losses.is_meta and losses.shape == (1,) and losses.dtype == torch.float32
            z = torch.tensor([[0.0, 1.0]], device="cpu")
            torch_sce.SparseCategoricalCrossentropy()([1], z).item()
            assert torch_sce.samples.CLIP[torch.float32][1] == 1 - 2**-23
        """)
