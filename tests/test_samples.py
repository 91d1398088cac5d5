"""Arguments that need no conversion, as most have, take a short way through `prepare`."""

import itertools

import pytest
import torch

from torch_sce import samples
from torch_sce.kernels import cpu
from torch_sce.samples import Samples, prepare

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BAD = {
    "one too large": lambda y: y.index_fill(0, torch.tensor([0]), 3),
    "one too small": lambda y: y.index_fill(0, torch.tensor([0]), -1),
    "too many": lambda y: torch.cat([y, y]),
}
LABELS = {
    "as they are": lambda y: y,
    "int32": lambda y: y.int(),
    "floats": lambda y: y.double(),
    "with a class axis": lambda y: y.unsqueeze(-1),
    "a list": lambda y: y.tolist(),
}
SHAPES = [(4, 3), (4, 5, 3), (3,), (0, 3), (4, 0), ()]
CASES = [*itertools.product(SHAPES, LABELS), *itertools.product(SHAPES[:2], BAD)]


def prepared(way, y, z, options):
    """What `prepare` gives, or the error it raises, by the short way if there is one or not."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "long":
            patch.setattr(samples, "_as_given", lambda *_: None)
        try:
            return prepare(y, z, **options)
        except (ValueError, TypeError) as error:
            return type(error), str(error)


def is_short(y, z, options):
    weight, mask = options.get("sample_weight"), options.get("mask")
    return samples._as_given(y, z, weight, mask, options["axis"], options["dtype"]) is not None


def compare(y, z, options):
    short, long = (prepared(way, y, z, options) for way in ("short", "long"))
    assert type(short) is type(long)
    if not isinstance(short, Samples):
        assert short == long
        return
    assert isinstance(long, Samples)
    for name, a, b in zip(Samples._fields, short, long, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            assert a == b, name


@pytest.mark.parametrize(("shape", "labels"), CASES)
def test_both_ways_give_the_same(shape, labels):
    drawn = torch.Generator().manual_seed(0)
    shorts = 0
    for kind, dtype, logits, axis, ignored in itertools.product(
        FLOATS, (*FLOATS, None), (True, False), (-1, 0, 1), (None, -1)
    ):
        z = torch.rand(shape, generator=drawn).to(kind)
        y = torch.randint(3, shape[:-1], generator=drawn)
        y = (LABELS | BAD)[labels](y)
        options = {"from_logits": logits, "axis": axis, "dtype": dtype, "ignore_class": ignored}
        compare(y, z, options)
        shorts += is_short(y, z, options)
    has_rows = len(shape) > 0 and 0 not in shape
    assert (shorts > 0) == (has_rows and labels in ("as they are", *list(BAD)[:2]))


WEIGHTS = {
    "as they are": lambda x: x,
    "bools": lambda x: x > 0.5,
    "integers": lambda x: (x * 3).long(),
    "a list": lambda x: x.tolist(),
    "with a class axis": lambda x: x.unsqueeze(-1),
    "for each step": lambda x: x[:1],
    "one for each example": lambda x: x[:, 0],
    "too many": lambda x: torch.cat([x, x]),
    "complex": lambda x: x.cfloat(),
    "nested": lambda x: torch.nested.as_nested_tensor(list(x)),
    "none": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", WEIGHTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_both_ways_give_the_same_with_weights_and_masks(weight, mask):
    drawn = torch.Generator().manual_seed(0)
    is_short_one = {"as they are", "bools", "none"}.issuperset({weight, mask})
    for dtype, ignored, bad in itertools.product(FLOATS, (None, -1, 2, 0.5), (None, 0, 1)):
        z = torch.rand((4, 5, 3), generator=drawn)
        y = torch.randint(-1 if ignored == -1 else 0, 3, (4, 5), generator=drawn)
        options = {"from_logits": True, "axis": -1, "dtype": None, "ignore_class": ignored}
        options["sample_weight"] = WEIGHTS[weight](torch.rand(4, 5, generator=drawn).to(dtype))
        options["mask"] = WEIGHTS[mask](torch.rand(4, 5, generator=drawn).round().to(dtype))
        if bad is not None:  # perhaps where the mask is 0
            y[1, bad] = 7
        compare(y, z, options)
        assert is_short(y, z, options) == is_short_one


@pytest.mark.parametrize("counts", ["all", "some", "none"])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("classes", [1, 3, 2**31, 2**62])
def test_any_label_that_counts_and_is_no_class_is_found(rows, classes, counts):
    drawn = torch.Generator().manual_seed(rows)
    y = torch.randint(min(classes, 1000), (rows,), generator=drawn)
    counted = {
        "all": None,
        "some": torch.rand(rows, generator=drawn) < 0.5,
        "none": torch.zeros(rows, dtype=torch.bool),
    }[counts]
    number = rows if counted is None else int(counted.sum())
    assert cpu.count_labels(y, counted, classes) == number
    for at in {0, rows // 2, rows - 1} if rows else ():
        found = None if counted is None or counted[at] else number
        for label in (-1, classes, classes + 1, -(2**63), 2**63 - 1):
            other = y.clone()
            other[at] = label
            assert cpu.count_labels(other, counted, classes) == found
        other[at] = classes - 1
        assert cpu.count_labels(other, counted, classes) == number
        apart = torch.stack([other, other - classes], 1)[:, 0]
        assert cpu.count_labels(apart, counted, classes) == number
