"""Random cases over everything the loss accepts, and much that it must refuse.

A case depends only on `(seed, index)`, so any case can be drawn again by itself. Most options have
ordinary values in most cases: an unusual value mostly occurs alone, and pairs of them often
enough.

Values are chosen so that the answer does not depend on rounding. Weights that may add up to zero
are multiples of 1/4, whose sums are exact in any order and dtype: a denominator is zero in every
implementation or in none. `Bits` gives the same case on every machine.

Large tensors use other code paths than small ones, so some cases are `LARGE`; outliers, tiny and
huge values are drawn most often for these.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from .bits import Bits
from .cases import LOSSES, OF_A_HEAD, Batch, Case, Head, one_hot, pick_weights, to_bfloat16
from .draw_metrics import draw_metric

REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None)
LARGE = 2**18 + 1  # predictions: more than any threshold of the CPU's kernels
MOST_LOGITS = 2**20  # of a head
OUTLIERS = (10.0, 30.0, 100.0, 300.0, 1e4, 1e6, 1e10, 1e20, 1e30)
LARGE_SIZES = ("large", "very many classes")
# Features and their values in ordinary use.
EVERYDAY = {
    "form": ("class",),
    "values": ("normal", "wide", "softmax", "peaked", "confident"),
    "dtype of y_pred": ("float32",),
    "dtype": ("None", "float32"),
    "labels": ("valid",),
    "targets": ("one-hot", "soft"),
    "shape of y_true": ("plain", "trailing 1"),
    "axis": ("-1", "last"),
    "size": ("small", "square", "many examples", "many classes", "large", "very many classes"),
    "values of sample_weight": ("positive", "arbitrary", "with zeros"),
    "sample_weight": ("none", "losses' own", "(B, 1, ...)", "scalar"),
    "mask": ("none", "losses' own", "(B, 1, ...)"),
    "dtype of mask": ("bool", "int32", "float32"),
    "reduction": tuple(map(str, REDUCTIONS)),
    "given as": ("arrays",),
    "upstream": ("ordinary",),
}
LABEL_DTYPES = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


def draw(seed: int, index: int) -> Case:
    """The case of that number."""
    bits = Bits(seed, index)
    what = bits.pick({"SparseCategoricalCrossentropy": 10, "CategoricalCrossentropy": 4.5, None: 4})
    return draw_metric(bits, seed, index) if what is None else _loss(bits, seed, index, what)


def is_everyday(case: Case) -> bool:
    """Whether all features of a loss are those of ordinary use. Those with a head are left out."""
    if not case.is_loss or case.head is not None:
        return False
    found = case.features
    return all(found.get(name, values[0]) in values for name, values in EVERYDAY.items())


def _loss(bits, seed: int, index: int, name: str) -> Case:
    features = {"loss": name}
    form = features["form"] = bits.pick({"class": 9, "function": 1})
    loss_shape, classes = _shape(bits, features)
    from_logits = bits.chance(0.7 if _is_large(features) else 0.5)
    features["predictions are"] = "logits" if from_logits else "probabilities"
    options: dict[str, Any] = {"from_logits": from_logits}
    label = bits.integers(0, max(classes, 1), loss_shape)
    y_pred = (_logits if from_logits else _probabilities)(bits, features, label, classes)
    y_pred, y_pred_dtype = _predictions_dtype(bits, features, y_pred)
    if name == LOSSES[0]:
        y_pred, options["axis"] = _axis(bits, features, y_pred, 2)
        y_true, options["ignore_class"] = _labels(bits, features, label, classes)
        y_true = _label_shape(bits, features, y_true, options["axis"])
    else:
        axes = y_pred.ndim
        y_true = _targets(bits, features, label, classes)
        y_pred, options["axis"] = _axis(bits, features, y_pred, 6)
        if y_true.ndim == axes and -axes <= options["axis"] < axes:
            y_true = np.moveaxis(y_true, -1, options["axis"])
        options["label_smoothing"] = _smoothing(bits, features)
        y_true, y_pred = _target_shape(bits, features, y_true, y_pred)

    weight = mask = None
    as_lists = False
    if form == "class":
        options["reduction"] = _reduction(bits, features)
        odds = {None: 20, "float16": 1, "bfloat16": 1, "float32": 1, "float64": 3}
        options["dtype"] = bits.pick(odds)
        features["dtype"] = str(options["dtype"])
        weight = _weights(bits, features, options, loss_shape)
        mask = _mask(bits, features, loss_shape)
    if y_pred_dtype == "float32" and not _is_large(features) and bits.chance(0.03):
        as_lists, mask = True, None  # lists have no mask
    features["given as"] = "lists" if as_lists else "arrays"
    batch = Batch(y_true, y_pred, y_pred_dtype, weight, mask)
    losses = max(label.size, y_pred.size // max(1, y_pred.shape[-1]))  # if that is a trailing 1
    upstream = _upstream(bits, features, options, y_pred_dtype, losses)
    if options.get("reduction", "none") in ("none", None) and name == LOSSES[1]:
        # Targets (C, 1) make (C,) predictions C positions of one class.
        matched = len(y_true) if (y_true.ndim, y_pred.ndim) == (2, 1) else 0
        upstream = np.resize(upstream, max(losses, matched, 1))
    return Case(seed, index, name, form, options, batch, as_lists, upstream, features)


def with_head(case: Case) -> Case | None:
    """The case of a loss of integer labels with a head that makes its logits; None for any other.

    Labels, weights, mask, options and upstream are the case's. The largest cases have no head.
    """
    if not (case.is_loss and case.is_sparse and case.y_pred.size < MOST_LOGITS):
        return None
    bits = Bits(case.seed, case.index, 1)
    features = case.features | {"loss": OF_A_HEAD, "predictions are": "logits"}
    for name in ("axis", "given as"):
        features.pop(name)
    axis = case.options["axis"] if case.features["axis"] == "other" else -1
    *before, classes = np.moveaxis(case.y_pred, axis, -1).shape
    x, weight, bias = _hidden_and_weights(bits, features, case, tuple(before), classes)
    dtype = features["dtype of y_pred"] = _dtype_of_head(case)
    with np.errstate(all="ignore"):
        x, weight, bias = (_rounded(each, dtype) for each in (x, weight, bias))
    softcap = bits.pick({None: 12, 5.0: 2, 30.0: 4, 0.5: 1})
    features["logit_softcap"] = str(softcap)
    size = np.dtype("float32" if dtype == "bfloat16" else dtype).itemsize
    row = (classes + 2 * x.shape[-1]) * size
    chunk_bytes = _chunk_bytes(bits, features, math.prod(before), row)
    transposed = bits.chance(0.3)
    features["layout"] = "transposed" if transposed else "contiguous"
    head = Head(weight, bias, softcap, chunk_bytes, transposed)
    batch = Batch(case.y_true, x, dtype, case.sample_weight, case.mask)
    options = case.options | {"from_logits": True, "axis": -1}
    return replace(case, options=options, batch=batch, as_lists=False, features=features, head=head)


def _hidden_and_weights(
    bits, features, case: Case, before: tuple[int, ...], classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The inputs (..., H), the weight (C, H) and the bias (C,) of a head."""
    large = _is_large(features)
    low, high = bits.pick({(1, 9): 6, (1, 2): 1, (2, 9) if large else (16, 80): 3})
    width = bits.integer(low, high)
    kind = bits.pick({"normal": 10, "wide": 3, "zeros": 1, "with nan": 1, "nan under the mask": 2})
    features["values"] = kind
    x, weight = bits.normal((*before, width)), bits.normal((classes, width))
    weight *= (4.0 if kind == "wide" else 1.0) / (1 if width < 9 else 4)
    if kind == "zeros":
        x = np.zeros_like(x)
    elif kind == "with nan":
        x = np.where(bits.flags(0.1, (*before, 1)), np.nan, x)
    elif kind == "nan under the mask" and case.mask is not None and case.mask.shape == before:
        x = np.where((case.mask == 0)[..., None], np.nan, x)
    values = bits.pick({"none": 10, "normal": 6, "with an offset": 3, "with -inf": 2})
    features["bias"] = values
    if values == "none":
        return x, weight, None
    bias = bits.normal((classes,))
    if values == "with an offset":
        bias = bias + bits.choice([22.0, -36.0])
    elif values == "with -inf":
        bias = np.where(bits.flags(0.15, (classes,)), -np.inf, bias)
    return x, weight, bias


def _dtype_of_head(case: Case) -> str:
    """That of the predictions; float16 only if no gradient is too large or too small for it."""
    scaled = {case.features["upstream"], case.features.get("values of sample_weight")}
    if case.y_pred_dtype == "float16" and scaled & {"tiny", "huge", "tiny or huge"}:
        return "float32"
    return "float32" if case.y_pred_dtype == "int32" else case.y_pred_dtype


def _rounded(values: np.ndarray | None, dtype: str) -> Any:
    if values is None:
        return None
    return to_bfloat16(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(dtype)


def _chunk_bytes(bits, features, rows: int, size: int) -> int | None:
    """For chunks of one row, for all in one, or anything between; few if there are many rows."""
    kinds = {"of one row": 4, "of some rows": 6, "one": 3}
    if rows > 300:
        del kinds["of one row"]
    kind = features["chunks"] = bits.pick(kinds)
    if kind == "one":
        return bits.choice([None, 2**40])
    return 1 if kind == "of one row" else bits.integer(1 + rows * size // 3, 2 + rows * size)


def _is_large(features) -> bool:
    return features["size"] in LARGE_SIZES


def _shape(bits, features) -> tuple[tuple[int, ...], int]:
    rank = bits.pick({0: 1, 1: 8, 2: 6, 3: 2})
    loss_shape = tuple(bits.integer(1, 7) for _ in range(rank))
    classes = bits.integer(2, 12)
    kind = bits.pick({"small": 30, "one class": 2, "no positions": 1, "square": 6, "B = 1": 2,
                       "many examples": 2, "many classes": 2, "no classes": 0.5, "large": 0.5,
                      "very many classes": 0.08})  # fmt: skip
    if kind == "one class":
        classes = 1
    elif kind == "no classes":
        classes = 0
    elif kind == "many classes":
        classes, loss_shape = bits.integer(200, 3000), loss_shape[:1]
    elif kind == "large":
        loss_shape, classes = _large_shape(bits)
    elif kind == "very many classes":  # and too few rows to be large
        classes, loss_shape = bits.integer(20_000, 60_000), (1, 2) if rank else ()
    elif kind == "many examples":
        loss_shape = (bits.integer(200, 800), *loss_shape[1:2])
    elif kind == "no positions" and rank > 0:
        empty = bits.integer(0, rank)
        loss_shape = tuple(0 if i == empty else n for i, n in enumerate(loss_shape))
    elif kind == "square" and rank > 1:
        loss_shape = loss_shape[:1] * rank
    elif kind == "B = 1" and rank > 0:
        loss_shape = (1, *loss_shape[1:])
    features["size"] = kind
    features["rank of y_pred"] = str(len(loss_shape) + 1)
    return loss_shape, classes


def _large_shape(bits) -> tuple[tuple[int, ...], int]:
    """Rows of few classes, of many, or one row of all, on one to three axes."""
    size = bits.integer(LARGE, LARGE * 3 // 2)
    low, high = bits.pick({(2, 12): 3, (200, 4000): 4, (LARGE, LARGE * 3 // 2): 1})
    classes = bits.integer(low, high)
    rows = -(-size // classes)
    before = tuple(bits.integer(2, 6) for _ in range(bits.pick({0: 4, 1: 3, 2: 1})))
    return (*before, -(-rows // math.prod(before))), classes


def _logits(bits, features, label, classes) -> np.ndarray:
    shape = (*label.shape, classes)
    odds = {"normal": 8, "wide": 6, "with an offset": 3, "huge": 1, "equal": 1, "with -inf": 2,
            "with inf": 1, "with nan": 1, "zeros": 1, "an outlier": 2, "gaps": 1,
            "confident": 1}  # fmt: skip
    if _is_large(features):
        odds |= {"normal": 2, "with an offset": 6, "an outlier": 10, "gaps": 12, "confident": 4}
    kind = features["values"] = bits.pick(odds)
    z = bits.normal(shape)
    if kind == "wide":
        z *= bits.choice([5.0, 20.0, 100.0])
    elif kind == "with an offset":
        offset = bits.choice([22.0, -36.0, 1e3, -1e4, 1e5])
        z = (z if abs(offset) < 100 else z * 3) + offset
    elif kind == "huge":
        z *= bits.choice([1e4, 1e30, 1e33])  # sums of these stay finite
    elif kind == "equal":
        z = np.broadcast_to(z[..., :1], shape).copy()
    elif kind == "zeros":
        z = np.zeros(shape)
    elif z.size and kind in ("an outlier", "gaps", "confident"):
        _set_apart(bits, z.reshape(-1, classes), label.ravel(), kind)
    return _sprinkle(bits, z, kind)


def _set_apart(bits, z, label, kind) -> None:
    """Moves logits z (N, C), most within -6 and 6, far from the rest, in place."""
    every = np.arange(len(z))
    if kind == "confident" or (kind == "an outlier" and bits.chance(0.5)):
        z[every, label] = 16 + 90 * bits.uniform(label.shape)
    if kind == "an outlier":
        row = bits.integer(0, len(z))
        at = label[row] if bits.chance(0.5) else bits.integer(0, z.shape[1])
        z[row, at] = bits.choice([1.0, -1.0]) * bits.choice(OUTLIERS) * bits.integer(4, 12) / 4
    elif kind == "gaps":  # in one row, or in some
        rows = every[bits.flags(0.3, label.shape)] if bits.chance(0.5) else every[-1:]
        top, below = 10 + 18 * bits.uniform(rows.shape), -60 - 19 * bits.uniform(rows.shape)
        if bits.chance(0.4):  # exp overflows
            top, below = 3 * top, 2 * below
        z[rows, (label[rows] + 1) % z.shape[1]] = top
        z[rows, label[rows]] = below


def _probabilities(bits, features, label, classes) -> np.ndarray:
    shape = (*label.shape, classes)
    kind = bits.pick({"softmax": 8, "peaked": 4, "with zeros and ones": 4, "unnormalised": 3,
                      "outside [0, 1]": 2, "at the bounds": 2, "with -inf": 0.7, "with inf": 0.7,
                      "with nan": 1, "uniform": 1})  # fmt: skip
    features["values"] = kind
    values = bits.shares(shape, 28 if kind == "peaked" else 6)
    if kind == "peaked" and bits.chance(0.5):
        values *= bits.choices([1, 2.0**-30, 2.0**-60], shape)
    elif kind == "with zeros and ones" and classes:
        hot = one_hot(bits.integers(0, classes, label.shape), classes)
        values = np.where(bits.flags(0.6, (*label.shape, 1)), hot, values)
        values = np.where(bits.flags(0.2, shape), 0.0, values)
    elif kind == "unnormalised":
        values = bits.uniform(shape)
    elif kind == "outside [0, 1]":
        values = bits.normal(shape) * 2
    elif kind == "at the bounds":
        low, high = np.float32(1e-7), np.float32(1 - 1e-7)
        edge = [low, np.nextafter(low, np.float32(0)), np.nextafter(low, np.float32(1)),
                high, np.nextafter(high, np.float32(0)), np.float32(1), 3e-7]  # fmt: skip
        values = np.where(bits.flags(0.4, shape), bits.choices(edge, shape), values)
    elif kind == "uniform" and classes:
        values = np.full(shape, 1 / classes)
    return _sprinkle(bits, values, kind)


def _sprinkle(bits, values, kind) -> np.ndarray:
    odd = {"with -inf": -np.inf, "with inf": np.inf, "with nan": np.nan}.get(kind)
    return values if odd is None else np.where(bits.flags(0.15, values.shape), odd, values)


def _predictions_dtype(bits, features, values) -> tuple[np.ndarray, str]:
    dtype = bits.pick({"float32": 14, "float16": 1, "bfloat16": 1, "float64": 2, "int32": 0.3})
    features["dtype of y_pred"] = dtype
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            return to_bfloat16(values.astype(np.float32)), dtype
        if dtype == "int32":
            return np.clip(np.nan_to_num(values), -1e6, 1e6).astype(np.int32), dtype
        return values.astype(dtype), dtype


def _axis(bits, features, y_pred, other: float) -> tuple[np.ndarray, int]:
    rank = y_pred.ndim
    if features["size"] == "very many classes":
        other = 30
    kind = bits.pick({"-1": 30, "last": 3, "other": other, "outside": 0.5})
    axis = -1
    if kind == "last":
        axis = rank - 1
    elif kind == "outside":
        axis = bits.choice([rank, rank + 2, -rank - 1])
    elif kind == "other" and rank > 1:
        axis = bits.integer(0, rank - 1)
        y_pred = np.ascontiguousarray(np.moveaxis(y_pred, -1, axis))
        if bits.chance(0.5):
            axis -= rank
    features["axis"] = kind
    return y_pred, axis


def _labels(bits, features, labels, classes) -> tuple[np.ndarray, Any]:
    """Labels and the class to ignore, which depend on each other."""
    shape = labels.shape
    kind = bits.pick({"none": 20, "a class": 3, "-1": 4, "255": 2, "-100": 1, "all": 1,
                       "a float": 1, "absent": 1, "True": 0.5})  # fmt: skip
    ignore = {"-1": -1, "255": 255, "-100": -100, "a float": 1.0, "absent": -7, "True": True}.get(
        kind, bits.integer(0, max(classes, 1)) if kind != "none" else None
    )
    if kind == "all":
        labels = np.full(shape, ignore)
    elif ignore is not None and kind != "absent":
        labels = np.where(bits.flags(0.4, shape), int(ignore), labels)
    features["ignore_class"] = kind

    values = bits.pick({"valid": 30, "outside": 1.2, "fractional": 2})
    if values == "outside":
        odd = bits.choice([-1, -100, classes, classes + 3, 255])
        labels = np.where(bits.flags(0.3, shape), odd, labels)
    dtype = bits.pick({"int64": 10, "int32": 5, "other": 8, "float": 3})
    if values == "fractional":
        dtype = "float"
    if dtype == "other":
        dtype = bits.choice(LABEL_DTYPES)
    elif dtype == "float":
        dtype = bits.choice(["float32", "float16", "float64"])
    if not np.issubdtype(np.dtype(dtype), np.floating) and labels.size:
        limits = np.iinfo(dtype) if dtype != "bool" else None
        low, high = (limits.min, limits.max) if limits else (0, 1)
        if labels.min() < low or labels.max() > high:
            dtype = "int64"
    if dtype == "float16" and classes > 2**15:
        dtype = "float32"
    labels = labels.astype(dtype)
    if values == "fractional":
        whole = bits.flags(0.4, shape)
        labels = (labels + np.where(whole, 0, bits.choice([0.25, 0.5, 0.75]))).astype(dtype)
        if bits.chance(0.3):
            odd = bits.choice([-0.5, -0.9, 1.5, np.nan, np.inf, 1 - 1e-9, 2 - 1e-9])
            labels = np.where(bits.flags(0.3, shape), odd, labels).astype(dtype)
            ignore = 1.5 if ignore is not None and bits.chance(0.5) else ignore
    features["labels"] = values
    features["dtype of y_true"] = dtype
    return labels, ignore


def _targets(bits, features, label, classes) -> np.ndarray:
    shape = (*label.shape, classes)
    kind = bits.pick({"one-hot": 8, "soft": 6, "unnormalised": 2, "all zero": 0.7, "signed": 0.5,
                      "with nan": 0.5})  # fmt: skip
    values = one_hot(label, classes)
    if kind == "soft":
        values = bits.shares(shape, 12)
    elif kind == "unnormalised":
        values = bits.uniform(shape) * 3
    elif kind == "all zero":
        values = values * bits.flags(0.5, (*label.shape, 1))
    elif kind == "signed":
        values = bits.integers(-2, 3, shape) / 2
    elif kind == "with nan":
        values = np.where(bits.flags(0.1, shape), np.nan, values)
    dtypes = {"float32": 12, "float64": 2, "float16": 1}
    if kind == "one-hot":
        dtypes |= {"int64": 4, "int32": 1, "uint8": 1, "bool": 1}
    dtype = bits.pick(dtypes)
    features["targets"] = kind
    features["dtype of y_true"] = dtype
    return values.astype(dtype)


def _smoothing(bits, features) -> Any:
    smoothing = bits.pick({0.0: 12, 0.1: 5, 0.3: 2, 1: 0.7, None: 0.5, 1.5: 0.4, -0.1: 0.4})
    features["label_smoothing"] = str(smoothing)
    return smoothing


def _target_shape(bits, features, y_true, y_pred) -> tuple[np.ndarray, np.ndarray]:
    if _is_large(features):
        return y_true, y_pred
    kind = bits.pick({"plain": 30, "trailing 1": 1, "y_pred has a trailing 1": 1, "class numbers":
                      0.5, "one example": 0.5, "other classes": 0.5})  # fmt: skip
    features["shape of y_true"] = kind
    if kind == "trailing 1":
        return y_true[..., None], y_pred
    if kind == "y_pred has a trailing 1":
        return y_true, y_pred[..., None]
    if kind == "class numbers":
        return y_true[..., 0] if y_true.shape[-1] else y_true, y_pred
    if kind == "one example":
        return y_true[:1], y_pred
    if kind == "other classes":
        return np.concatenate([y_true, y_true], -1), y_pred
    return y_true, y_pred


def _label_shape(bits, features, labels, axis) -> np.ndarray:
    if _is_large(features):
        return labels
    kind = bits.pick({"plain": 20, "trailing 1": 7, "two trailing 1": 1,
                       "1 at the class axis": 1, "flat": 0.7, "leading 1": 0.5, "scalar": 0.3,
                       "one too many": 0.3})  # fmt: skip
    features["shape of y_true"] = kind
    if kind == "trailing 1":
        return labels[..., None]
    if kind == "two trailing 1":
        return labels[..., None, None]
    if kind == "1 at the class axis":
        return np.expand_dims(labels, max(-labels.ndim - 1, min(axis, labels.ndim)))
    if kind == "flat":
        return labels.reshape(-1)
    if kind == "leading 1":
        return labels[None]
    if kind == "scalar" and labels.size:
        return labels.reshape(-1)[0]
    if kind == "one too many" and labels.ndim:
        return np.concatenate([labels, labels[:1]])
    return labels


def _reduction(bits, features) -> Any:
    reduction = bits.pick(
        {**{r: 5 for r in REDUCTIONS}, "sum_over_batch_size": 9, "auto": 1, "average": 0.4}
    )
    features["reduction"] = str(reduction)
    return reduction


def _weight_shape(bits, loss_shape, large: bool) -> tuple[str, tuple[int, ...]]:
    """The name of a shape, and the shape: all those that Keras accepts, and some others."""
    full = loss_shape
    if large:  # others could make an outer product of it
        return "losses' own", full
    choices: dict[str, tuple[float, tuple[int, ...]]] = {
        "losses' own": (8, full),
        "with a trailing 1": (3, (*full, 1)),
        "scalar": (2, ()),
        "(1,)": (1, (1,)),
        "(B,)": (1.5, full[:1]),
        "last axis only": (1, full[-1:]),
        "(B, 1, ...)": (3, (*full[:1], *(1 for _ in full[1:]))),
        "(1, ..., T)": (1, (*(1 for _ in full[1:]), *full[-1:])),
        "leading 1": (1, (1, *full)),
        "two trailing 1": (0.7, (*full, 1, 1)),
        "wrong": (0.4, (*full[:-1], (full[-1] + 1) if full else 3)),
        "squared": (0.5, (*full, *full[-1:])),
    }
    kind = bits.pick({name: odds for name, (odds, _) in choices.items()})
    return kind, choices[kind][1]


def _weights(bits, features, options, loss_shape) -> Any:
    if bits.chance(0.5):
        features["sample_weight"] = "none"
        return None
    kind, shape = _weight_shape(bits, loss_shape, _is_large(features))
    odds = {"positive": 5, "arbitrary": 5, "with zeros": 4, "signed": 2, "all zero": 1, "nan": 0.5}
    if _may_scale(options):
        odds["tiny or huge"] = 12 if _is_large(features) else 2
    values, weight = pick_weights(bits, shape, odds, options["from_logits"])
    features["sample_weight"] = kind
    features["values of sample_weight"] = values
    container = bits.pick({"float32": 10, "float64": 2, "int32": 1, "bool": 1, "list": 2})
    if container == "list":
        return weight.tolist()
    if container in ("int32", "bool") and values in ("nan", "tiny or huge"):
        container = "float32"
    return weight.astype(container)


def _mask(bits, features, loss_shape) -> np.ndarray | None:
    if bits.chance(0.7):
        features["mask"] = "none"
        return None
    kind, shape = _weight_shape(bits, loss_shape, _is_large(features))
    share = bits.pick({0.6: 10, 0.0: 1, 1.0: 1})
    mask = np.asarray(bits.flags(share, shape))
    dtype = bits.pick({"bool": 8, "int32": 1, "float32": 1, "half": 0.7})
    features["mask"] = kind
    features["dtype of mask"] = dtype
    return mask * np.float32(0.5) if dtype == "half" else mask.astype(dtype)


def _may_scale(options) -> bool:
    """Whether a gradient may be tiny or huge: not in half precision, which has no such numbers, nor
    where what overflows is multiplied by 0 after that.
    """
    halves = options.get("dtype") in ("float16", "bfloat16")
    return not halves and options.get("label_smoothing") != 1


def _upstream(bits, features, options, y_pred_dtype, size) -> np.ndarray:
    """What the losses are multiplied by: ordinary numbers, or these times a power of two."""
    upstream = bits.choices([-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0], (max(1, size),))
    odds = {"ordinary": 20}
    given = {"dtype": y_pred_dtype} | options  # a function's is that of the predictions
    if _may_scale(given) and features.get("values of sample_weight") != "tiny or huge":
        odds |= dict.fromkeys(("tiny", "huge"), 5 if _is_large(features) else 1)
    kind = features["upstream"] = bits.pick(odds)
    if kind == "tiny":
        upstream *= math.ldexp(1, -bits.integer(20, 121))
    elif kind == "huge":
        upstream *= math.ldexp(1, bits.integer(20, 101 if options["from_logits"] else 81))
    return upstream.astype(np.float32)
