"""The CPU's kernels as operators of compiled graphs."""

import pytest
import torch
from torch import library, nn
from torch.autograd import forward_ad

from torch_sce import CategoricalCrossentropy, SparseCategoricalCrossentropy
from torch_sce.kernels import native, operators
from torch_sce.samples import CLIP

pytestmark = [
    pytest.mark.skipif(not native, reason="installed without a C compiler"),
    pytest.mark.skipif("torch.get_default_device().type != 'cpu'"),
    pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="from PyTorch 2.7 on"),
]

MODELS = {"logits": None, "probabilities": CLIP[torch.float32]}
LAYOUTS = {
    "rows": lambda z: z,
    "channels first": lambda z: z.movedim(-1, 1).contiguous().movedim(1, -1),
    "half precision": lambda z: z.half(),
}


def predictions(model, shape=(3, 4, 9)):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return z if MODELS[model] is None else z.softmax(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_operators_are_declared_as_they_are(model, layout):
    z = LAYOUTS[layout](predictions(model)).requires_grad_()
    y = torch.randint(9, (3, 4))
    t = torch.rand(3, 4, 9).requires_grad_()
    clip, g = MODELS[model], torch.rand(3, 4)
    for counted in (None, torch.rand(3, 4) > 0.3):
        library.opcheck(operators._label_losses, (z, y, counted, clip))
        library.opcheck(operators._target_losses, (z, t, counted, clip, 0.1))
        library.opcheck(operators._target_losses, (z, y, counted, clip, 0.1))
        _, saved = operators._label_losses(z, y, counted, clip)
        library.opcheck(
            operators._label_gradients, (g, z.detach(), y, counted, clip, saved.detach())
        )
        _, saved = operators._target_losses(z, t, counted, clip, 0.1)
        given = (g, z.detach(), t.detach(), counted, clip, 0.1)
        for needs in ([True, False], [False, True], [True, True]):
            library.opcheck(operators._target_gradients, (*given, needs, saved.detach()))
        _, saved = operators._target_losses(z, y, counted, clip, 0.1)
        given = (g, z.detach(), y, counted, clip, 0.1, [True, False], saved.detach())
        library.opcheck(operators._target_gradients, given)


def compiled(step, *given):
    """What the compiled step returns, and the names of the operators in its graph."""
    names = []

    def look(graph, _inputs):
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.extend(name for name in calls if "torch_sce" in name)
        return graph.forward

    torch.compile(step, fullgraph=True, backend=look)(*given)
    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True)(*given), names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("from_logits", [True, False])
def test_compiled_losses_have_the_bits_of_eager_ones(from_logits, layout):
    torch._dynamo.reset()
    z = LAYOUTS[layout](predictions("logits" if from_logits else "probabilities"))
    y, t = torch.randint(-1, 9, (3, 4)), torch.rand(3, 4, 9)
    sparse = SparseCategoricalCrossentropy(from_logits, ignore_class=-1, reduction="none")
    dense = CategoricalCrossentropy(from_logits, reduction="none")

    def gradients(z, y, t):
        a, b = z.detach().requires_grad_(), t.detach().requires_grad_()
        first, second = sparse(y, a), dense(b, a)
        return first, second, *torch.autograd.grad(first.sum() + second.sum(), (a, b))

    eager = gradients(z, y, t)
    a, b = z.clone().requires_grad_(), t.clone().requires_grad_()
    (first, second), names = compiled(lambda y, z, t: (sparse(y, z), dense(t, z)), y, a, b)
    assert len(names) == 2
    found = torch.autograd.grad(first.sum() + second.sum(), (a, b))
    for got, want in zip((first, second, *found), eager, strict=True):
        assert torch.equal(got, want) or got is found[0]
    torch.testing.assert_close(found[0], eager[2])  # Inductor adds the two gradients of z


class Step(nn.Module):
    loss = SparseCategoricalCrossentropy(from_logits=True)

    def forward(self, z, y):
        return self.loss(y, z)


def test_an_exported_program_needs_no_operator():
    given = torch.randn(3, 9), torch.randint(9, (3,))
    for strict in (True, False):
        program = torch.export.export(Step(), given, strict=strict)
        assert "torch_sce" not in str(program.graph)
        torch.testing.assert_close(program.module()(*given), Step()(*given))


def test_transforms_within_a_compiled_function_need_no_operator():
    z, y = torch.randn(3, 9), torch.randint(9, (3,))
    loss = SparseCategoricalCrossentropy(from_logits=True)
    each = torch.func.vmap(torch.func.grad(lambda z, y: loss(y, z)))
    torch._dynamo.reset()
    found, names = compiled(each, z, y)
    assert not names
    torch.testing.assert_close(found, each(z, y))


def test_forward_derivatives_in_a_compiled_function_need_no_operator():
    z, v, y = torch.randn(3, 9), torch.randn(3, 9), torch.randint(9, (3,))
    loss = SparseCategoricalCrossentropy(from_logits=True)
    want = torch.func.jvp(lambda z: loss(y, z), (z,), (v,))[1]
    torch._dynamo.reset()
    step = torch.compile(lambda z: loss(y, z), backend="aot_eager")
    with forward_ad.dual_level():
        value = step(forward_ad.make_dual(z, v))
        torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, want)


def test_compiled_targets_of_8_bits_have_gradients():
    z, t = torch.randn(3, 9), torch.rand(3, 9)
    loss = CategoricalCrossentropy(from_logits=True)

    def step(t):
        return loss(t.to(torch.float8_e5m2), z)

    torch._dynamo.reset()
    leaf = t.requires_grad_()
    (want,) = torch.autograd.grad(step(leaf), leaf)
    (found,) = torch.autograd.grad(torch.compile(step)(leaf), leaf)
    torch.testing.assert_close(found, want)
