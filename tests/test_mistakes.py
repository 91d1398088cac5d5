"""`cross_check.py batch --got NUMBER`: the mistake that gives a number is named."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_sce.crosscheck import batch, mistakes
from torch_sce.crosscheck.answers import ours
from torch_sce.crosscheck.mistakes import Number

rng = np.random.default_rng(0)
B, T, C = 6, 8, 5
Z = 2 * torch.tensor(rng.standard_normal((B, T, C)), dtype=torch.float32)
P = Z.softmax(-1)
Y = torch.tensor(rng.integers(0, C, (B, T)))
LENGTHS = torch.tensor([8, 7, 5, 3, 2, 2])
COUNTED = torch.arange(T) < LENGTHS[:, None]
PADDED = torch.where(COUNTED, Y, -1)
SQUARE = 2 * torch.tensor(rng.standard_normal((7, 7, 7)), dtype=torch.float32)  # B = T = C
Y_SQUARE = torch.tensor(rng.integers(0, 7, (7, 7)))
BY_CLASS = torch.tensor([1, 2, 0.5, 4, 1, 3, 0.25])
BY_EXAMPLE = torch.linspace(0.5, 2, 7)
MANY = 3 * torch.tensor(rng.standard_normal((3, 3000)), dtype=torch.float32)
FAR = torch.tensor([[50.0, 0, -50], [1, 2, 3]])


def each(z, y, **options):
    flat = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none", **options)
    return flat.reshape(y.shape)


def clipped(q, y):
    c = q.clamp(1e-7, 1 - 1e-7)
    return (c.sum(-1).log() - c.gather(-1, y[..., None])[..., 0].log()).mean()


LOSSES = each(Z, PADDED, ignore_index=-1)
LOGITS, IGNORING = ["--from-logits"], ["--from-logits", "--ignore-class", "-1"]

# The arrays, the options, the number that the code with the mistake gives, and its name.
PLANTED = {
    "the logits under the softmax, or not": (
        ([2, 1], FAR), LOGITS, clipped(FAR.softmax(-1), torch.tensor([2, 1])),
        "takes the softmax first, whose probabilities the loss clips"),
    "softmax twice": (
        (Y, P), [], each(P, Y).mean(), "takes a softmax of probabilities, as `F.cross_entropy`"),
    "a softmax in the model, too": (
        (Y, Z), LOGITS, each(P, Y).mean(), "takes a softmax before a loss that takes another"),
    "from_logits forgotten": (
        (Y, Z), LOGITS, clipped(Z, Y), "treats logits as probabilities, without `from_logits"),
    "T = C": (
        (Y_SQUARE, SQUARE), LOGITS, F.cross_entropy(SQUARE, Y_SQUARE),
        "has the classes on axis 1, not 2, as `F.cross_entropy`"),
    "class weights of PyTorch": (
        (Y_SQUARE, SQUARE, BY_CLASS[Y_SQUARE]), LOGITS,
        F.cross_entropy(SQUARE.flatten(0, 1), Y_SQUARE.flatten(), weight=BY_CLASS),
        "divides by the weights, as `F.cross_entropy(weight=...)` does"),
    "class weights of PyTorch and padding": (
        (PADDED, Z, BY_CLASS[PADDED.clamp(0)]), IGNORING,
        F.cross_entropy(Z.flatten(0, 1), PADDED.flatten(), BY_CLASS[:C], ignore_index=-1),
        "divides by the weights, as `F.cross_entropy(weight=...)` does"),
    "class_weight of fit": (
        (Y_SQUARE, SQUARE, BY_CLASS[Y_SQUARE]), LOGITS,
        (each(SQUARE, Y_SQUARE) * BY_CLASS[Y_SQUARE.argmax(-1)]).mean(),
        "has the class weights of the largest label along the time, as `fit(class_weight=...)`"),
    "weights along the time": (
        (Y_SQUARE, SQUARE, BY_EXAMPLE[:, None]), LOGITS,
        (each(SQUARE, Y_SQUARE) * BY_EXAMPLE).mean(), "has the weights `(B,)` along the time axis"),
    "padding in the denominator": (
        (PADDED, Z), IGNORING, LOSSES.mean(), "divides by all positions, also by those that are"),
    "padding as a class": (
        (PADDED, Z), IGNORING, each(Z, PADDED.clamp(0)).mean(),
        "counts the positions with the label -1, as class 0"),
    "means of ranks": (
        (PADDED, Z), IGNORING,
        sum(LOSSES[i : i + 3].sum() / LENGTHS[i : i + 3].sum() for i in (0, 3)) / 2,
        "takes the mean of the means of 2 micro-batches or ranks"),
    "accumulated without a division": (
        (PADDED, Z), IGNORING,
        sum(LOSSES[i : i + 3].sum() / LENGTHS[i : i + 3].sum() for i in (0, 3)),
        "adds up the means of 2 micro-batches or ranks"),
    "each sequence first": (
        (PADDED, Z), IGNORING, (LOSSES.sum(1) / LENGTHS).mean(),
        "takes the mean of each example, and then the mean of these"),
    "sums of sequences": (
        (PADDED, Z), IGNORING, LOSSES.sum(1).mean(), "divides by the batch size 6"),
    "labels in half precision": (
        (torch.tensor([2049, 2051, 7]), MANY), LOGITS,
        each(MANY, torch.tensor([2048, 2052, 7])).mean(), "rounds the labels to float16"),
    "nothing counts": (
        (0 * Y - 1, Z), IGNORING, torch.tensor(torch.nan), "divides 0 by 0, as means of PyTorch"),
    "PyTorch's default": (
        (torch.where(COUNTED, Y, -100), Z), LOGITS,
        F.cross_entropy(Z.flatten(0, 1), torch.where(COUNTED, Y, -100).flatten()),
        "leaves out the positions with the label -100, PyTorch's default `ignore_index`"),
    "no mask": (
        (Y, Z, None, COUNTED), LOGITS, each(Z, Y).mean(), "has no mask, so that padding counts"),
    "an inverted mask": (
        (Y, Z, None, COUNTED), LOGITS, each(Z, Y)[~COUNTED].mean(), "inverts the mask"),
    "labels that start at 1": (
        (Y, Z), LOGITS, each(Z, (Y - 1) % C).mean(), "has labels that are one too small"),
    "labels shifted twice": (
        (PADDED, Z), IGNORING,
        F.cross_entropy(Z[:, :-1].flatten(0, 1), PADDED[:, 1:].flatten(), ignore_index=-1),
        "compares each position with the label of the next one"),
    "a sum": ((Y, Z), LOGITS, each(Z, Y).sum(), 'adds up the losses, as `reduction="sum"`'),
    "bits": ((Y, Z), LOGITS, each(Z, Y).mean() / np.log(2), "takes the logarithm to base 2"),
    "smoothed": (
        (Y, Z), LOGITS, F.cross_entropy(Z.flatten(0, 1), Y.flatten(), label_smoothing=0.1),
        "smooths the labels, with `label_smoothing=0.1`"),
    "two mistakes": (
        (PADDED, P), ["--ignore-class", "-1"], each(P, PADDED.clamp(0)).mean(),
        "takes a softmax of probabilities, as `F.cross_entropy` does, and counts the positions "
        "with the label -1, as class 0"),
    "three": (
        (PADDED, P, BY_CLASS[PADDED.clamp(0)]), ["--ignore-class", "-1"],
        each(P, PADDED.clamp(0)).mean(),
        "takes a softmax of probabilities, as `F.cross_entropy` does, and counts the positions "
        "with the label -1, as class 0, and has no weights"),
}  # fmt: skip


def case_of(arrays, arguments):
    names = ("y_true", "y_pred", "sample_weight", "mask")
    given = {k: np.asarray(v) for k, v in zip(names, arrays, strict=False) if v is not None}
    return batch._case(batch.parser().parse_args(["file", *arguments]), given)


def searched(arrays, arguments, text):
    """The search, with our answer in the place of tf.keras's."""
    case = case_of(arrays, arguments)
    mine, number = ours(case), Number(text)
    found = batch._searched(number, case, mine, mine, batch._steps(case, mine, mine))
    return found, batch._of_got(number, found)


@pytest.mark.parametrize("digits", [5, 8])
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named_first(name, digits):
    arrays, arguments, number, words = PLANTED[name]
    text = f"{float(number):.{digits}g}"
    found, said = searched(arrays, arguments, text)
    assert said.startswith(f"{text} fits code that {words}"), said
    values = [match.value for match in found.matches]
    np.testing.assert_allclose(values, float(number), rtol=1e-4)


def test_with_three_digits_most_are_still_named_first():
    few = [
        searched(arrays, arguments, f"{float(number):.3g}")[1].split("fits code that ")[-1]
        for arrays, arguments, number, _ in PLANTED.values()
    ]
    named = [
        said.startswith(words) for said, (*_, words) in zip(few, PLANTED.values(), strict=True)
    ]
    assert sum(named) >= 0.8 * len(PLANTED)


def test_a_number_fits_within_its_last_digit():
    for text, fits, misses in (("3.02", 3.0249, 3.0252), ("3e1", 34.9, 35.1), ("-7", -7.4, -7.6),
                               ("0.25000", 0.250004, 0.25001)):  # fmt: skip
        assert Number(text).fits(fits) and not Number(text).fits(misses)
    assert Number("nan").fits(np.nan) and not Number("nan").fits(1.0)
    assert Number("inf").fits(np.inf) and not Number("1").fits(np.inf)


def test_the_loss_itself_is_no_mistake():
    _, said = searched((Y, Z), LOGITS, f"{each(Z, Y).mean():.6f}")
    assert said.startswith(f"{each(Z, Y).mean():.6f} fits code that does what tf.keras does (")


def test_a_number_of_nothing_is_said_to_be_so_with_the_nearest_mistake():
    found, said = searched((Y, Z), LOGITS, "7.7777")
    assert found.matches == [] and found.nearest is not None
    assert f"none of {found.tried} mistakes and combinations gives it. The nearest single" in said
    assert found.nearest.words in said and found.tried > 500


def test_what_gives_the_same_number_is_listed():
    _, said = searched((Y, P), [], f"{each(P, Y).mean():.6f}")
    assert "Or code that is `F.cross_entropy(y_pred.reshape(-1, 5), y_true.reshape(-1))`" in said
    assert said.endswith("They give the same number for this batch.")


def test_few_digits_are_said_to_be_few():
    found, said = searched((PADDED, Z), IGNORING, "2.8")
    assert len(found.matches) > 1 and found.by_chance > 1
    assert said.endswith("would fit by chance: pass more digits to be sure.")


@pytest.mark.parametrize("arguments", [
    LOGITS, [], [*IGNORING, "--reduction", "sum"], ["--ignore-class", "2"],
    [*LOGITS, "--reduction", "mean_with_sample_weight"],
])  # fmt: skip
@pytest.mark.parametrize("weight", [None, BY_CLASS[Y], BY_EXAMPLE[:B, None]])
@pytest.mark.parametrize("mask", [None, COUNTED])
def test_without_another_choice_it_is_the_loss(arguments, weight, mask):
    case = case_of((Y, Z if "--from-logits" in arguments else P, weight, mask), arguments)
    value = ours(case).value
    assert value is not None
    assert mistakes.Mistakes(case).value({}) == pytest.approx(float(value), rel=1e-6)


def test_code_that_raises_gives_no_number():
    case = case_of((PADDED, Z), LOGITS)
    assert mistakes.Mistakes(case).value({}) is None
    assert mistakes.Mistakes(case).value({"ignored": ("too", -1)}) is not None


def test_the_losses_are_the_same_in_blocks(monkeypatch):
    arrays, arguments, number, _ = PLANTED["two mistakes"]
    whole, _ = searched(arrays, arguments, f"{float(number):.6g}")
    monkeypatch.setattr(mistakes, "ELEMENTS", 20)
    parts, _ = searched(arrays, arguments, f"{float(number):.6g}")
    assert [match.words for match in whole.matches] == [match.words for match in parts.matches]
