"""What PyTorch offers only as private functions, and what its old compiler cannot compile."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_sce
from torch_sce.kernels import modes

FILES = sorted(Path(torch_sce.__file__).parent.rglob("*.py"))
PRIVATE = re.compile(r"torch\.(\w+\.)*_\w")


def seen(question, *places):
    """What the question is answered in a call that runs somewhere else."""
    answers = []

    def call(x):
        answers.append(question())
        return x * 2

    for place in places:
        place(call)
    return answers


def test_a_transform_is_active_within_it_and_no_longer():
    x = torch.ones(3)
    assert seen(
        modes.transforms_active,
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.functionalize(f)(x),
        lambda f: f(x),
    ) == [True, True, True, True, False]


def test_a_dispatch_mode_is_active_within_it_and_no_longer():
    def within(f):
        with FakeTensorMode():
            f(torch.ones(3))

    answers = seen(modes.dispatch_modes_active, within, lambda f: f(torch.ones(3)))
    assert answers == [True, False]


@pytest.mark.parametrize("batched", [True, False])
def test_gradients_are_batched_where_a_caller_asks_for_it(batched):
    answers = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *upstream):
            answers.append(not modes.has_memory(upstream[0]))
            return upstream[0] * 2

    x = torch.ones(3, requires_grad=True)
    upstream = torch.eye(3) if batched else torch.ones(3)
    (dx,) = torch.autograd.grad(Doubled.apply(x), x, upstream, is_grads_batched=batched)
    assert torch.equal(dx, 2 * upstream) and answers == [batched]


def test_functional_tensors_have_no_memory():
    x = torch.ones(3)
    assert modes.has_memory(x)
    assert torch.func.functionalize(modes.has_memory)(x) is False


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_jit_tracing_is_active_within_it_and_no_longer():
    def traced(f):
        torch.jit.trace(f, torch.ones(3), check_trace=False)

    answers = seen(modes.is_jit_tracing, traced, lambda f: f(torch.ones(3)))
    assert answers == [True, False]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_private_names_of_pytorch_are_in_one_file(file):
    assert bool(PRIVATE.search(file.read_text())) == (file.name == "modes.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_classes_are_tested_for_in_a_tuple(file):
    """PyTorch 2.6 does not compile `isinstance(x, A | B)`."""
    for call in ast.walk(ast.parse(file.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance":
            assert not isinstance(call.args[1], ast.BinOp), f"line {call.lineno}"
