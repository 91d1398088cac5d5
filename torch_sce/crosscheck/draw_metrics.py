"""Random cases of the metrics, in several updates with resets between, and of the accuracies."""

from dataclasses import replace
from typing import Any

import numpy as np

from .bits import Bits
from .cases import LOSSES, Batch, Case, one_hot, pick_weights, to_bfloat16

METRICS: dict[str, float] = {
    "SparseCategoricalAccuracy": 3,
    "CategoricalAccuracy": 2,
    "Accuracy": 1,
    "SparseTopKCategoricalAccuracy": 3,
    "TopKCategoricalAccuracy": 2,
    "SparseCategoricalCrossentropy": 3,
    "CategoricalCrossentropy": 2,
}


def draw_metric(bits: Bits, seed: int, index: int) -> Case:
    """A case of a metric, or of an accuracy as a function."""
    name = bits.pick(METRICS)
    features = {"metric": name}
    has_function = name not in (*LOSSES, "Accuracy")
    form = "function" if has_function and bits.chance(0.2) else "metric"
    features["form"] = form
    options = _options(bits, features, name)
    rank, classes = bits.pick({0: 0.5, 1: 8, 2: 5, 3: 1}), bits.integer(1, 9)
    dtype = bits.pick({"float32": 14, "float16": 0.7, "bfloat16": 1, "float64": 1, "int32": 0.5})
    features["dtype of y_pred"] = dtype
    features["rank of y_pred"] = str(rank + (name != "Accuracy"))
    steps: list[Batch | None] = [_batch(bits, features, name, options, rank, classes, dtype)]
    if form == "metric":
        options["dtype"] = bits.pick({None: 16, "float64": 2, "float16": 1, "bfloat16": 1})
        features["dtype"] = str(options["dtype"])
        updates = bits.integer(1, 4)
        for _ in range(updates - 1):
            if bits.chance(0.25):
                steps.append(None)
            steps.append(_batch(bits, {}, name, options, rank, classes, dtype))
        features["updates"] = f"{updates}{', reset between' if None in steps else ''}"
    as_lists = dtype == "float32" and form == "metric" and bits.chance(0.05)
    # Lists do not say what follows an axis of size 0.
    as_lists &= all(step is None or step.y_pred.size > 0 for step in steps)
    features["given as"] = "lists" if as_lists else "arrays"
    if as_lists:  # which have no mask
        steps = [step and replace(step, mask=None) for step in steps]
    first = steps[0]
    assert first is not None
    if form == "function":
        first = Batch(first.y_true, first.y_pred, dtype)
    none = np.empty(0, np.float32)
    return Case(seed, index, name, form, options, first, as_lists, none, features, tuple(steps[1:]))


def _options(bits, features, name) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "TopK" in name:
        options["k"] = bits.pick({1: 4, 2: 4, 3: 2, 5: 2, 9: 0.5, 0: 0.4, -1: 0.2})
        features["k"] = str(options["k"])
        if name.startswith("Sparse") and bits.chance(0.2):
            options["from_sorted_ids"] = True
            features["predictions are"] = "sorted class numbers"
    if name in LOSSES:
        options["from_logits"] = bits.chance(0.5)
        features["predictions are"] = "logits" if options["from_logits"] else "probabilities"
    if name == LOSSES[0]:
        options["ignore_class"] = bits.pick({None: 3, 0: 1, -1: 1})
        features["ignore_class"] = str(options["ignore_class"])
    if name == LOSSES[1]:
        options["label_smoothing"] = bits.pick({0.0: 3, 0.1: 1})
        features["label_smoothing"] = str(options["label_smoothing"])
    return options


def _batch(bits, features, name, options, rank, classes, dtype) -> Batch:
    shape = tuple(bits.integer(1, 6) for _ in range(rank))
    if rank and bits.chance(0.03):
        shape = (0, *shape[1:])
    y_pred = _predictions(bits, features, name, options, shape, classes)
    if dtype == "int32":
        y_pred = np.nan_to_num(y_pred, posinf=9, neginf=-9)
    y_pred = to_bfloat16(y_pred) if dtype == "bfloat16" else y_pred.astype(dtype)
    if name == "Accuracy":
        y_true = bits.integers(0, 4, shape)
        y_true = y_true.astype(bits.pick({"int64": 3, "int32": 2, "float32": 2, "float64": 1}))
    elif name.startswith("Sparse"):
        y_true = _labels(bits, features, name, options, shape, classes)
    else:
        y_true = _targets(bits, features, name, shape, classes)
    y_true = _shaped(bits, features, name, y_true)
    weight, mask = _weight(bits, features, shape), _mask(bits, features, shape)
    return Batch(y_true, y_pred, dtype, weight, mask)


def _predictions(bits, features, name, options, shape, classes) -> np.ndarray:
    if name == "Accuracy":
        return bits.integers(0, 4, shape).astype(np.float32)
    if options.get("from_sorted_ids"):
        ranks = bits.uniform((*shape, classes)).argsort(-1, kind="stable")
        return ranks.astype(np.float32)
    if name in LOSSES and not options["from_logits"]:
        return bits.shares((*shape, classes), 6).astype(np.float32)
    values = bits.normal((*shape, classes)).astype(np.float32)
    if name in LOSSES:
        return values * 3
    kind = bits.pick({"random": 8, "ties": 5, "all equal": 0.7, "with nan": 1, "with -inf": 1,
                      "with inf": 1})  # fmt: skip
    if kind == "ties":
        values = bits.integers(0, 3, values.shape).astype(np.float32)
        if bits.chance(0.3):  # between -0.0 and 0.0, too
            values *= bits.choices([-1, 1], values.shape).astype(np.float32)
    elif kind == "all equal":
        values = np.ones_like(values)
    elif kind != "random":
        odd = np.float32(kind.split()[1])
        values = np.where(bits.flags(0.2, values.shape), odd, values)
    features["values"] = kind
    return values


def _labels(bits, features, name, options, shape, classes) -> np.ndarray:
    labels = bits.integers(0, classes, shape)
    kind = bits.pick({"valid": 8, "outside": 1, "fractional": 1})
    if name in LOSSES:
        kind = "valid"
        if options["ignore_class"] is not None:
            labels = np.where(bits.flags(0.4, shape), options["ignore_class"], labels)
    if kind == "outside":
        odd = bits.choice([-1, -100, classes, classes + 3, 255])
        labels = np.where(bits.flags(0.3, shape), odd, labels)
    features["labels"] = kind
    if kind == "fractional":
        labels = labels + bits.choices([0, 0.25, 0.5, -0.5], shape)
        return np.asarray(labels).astype(bits.pick({"float32": 3, "float64": 1}))
    dtype = bits.pick({"int64": 6, "int32": 3, "float32": 2, "int16": 1})
    return np.asarray(labels).astype(dtype)


def _targets(bits, features, name, shape, classes) -> np.ndarray:
    kind = bits.pick({"one-hot": 6, "soft": 4, "ties": 1, "with nan": 0.5})
    values = one_hot(bits.integers(0, classes, shape), classes)
    if kind == "soft":
        values = bits.shares((*shape, classes), 12)
    elif kind == "ties":
        values = bits.integers(0, 2, values.shape)
    elif kind == "with nan" and name not in LOSSES:
        values = np.where(bits.flags(0.2, values.shape), np.nan, values)
    features["targets"] = kind
    return values.astype(bits.pick({"float32": 6, "float64": 1}))


def _shaped(bits, features, name, y_true) -> np.ndarray:
    kind = bits.pick({"plain": 20, "trailing 1": 4, "two trailing 1": 0.4, "flat": 0.5, "one": 0.4,
                      "leading 1": 0.3})  # fmt: skip
    if kind == "trailing 1" and not name.startswith(("Sparse", "Accuracy")) and bits.chance(0.7):
        kind = "plain"
    features["shape of y_true"] = kind
    if kind == "trailing 1":
        return y_true[..., None]
    if kind == "two trailing 1":
        return y_true[..., None, None]
    if kind == "flat":
        return y_true.reshape(-1)
    if kind == "one":
        return y_true[:1] if y_true.ndim else y_true
    if kind == "leading 1":
        return y_true[None]
    return y_true


def _weight_shape(bits, shape) -> tuple[str, tuple[int, ...]]:
    choices: dict[str, tuple[float, tuple[int, ...]]] = {
        "(B,)": (8, shape[:1]),
        "values' own": (5, shape),
        "with a trailing 1": (2, (*shape, 1)),
        "scalar": (1.5, ()),
        "(1,)": (0.7, (1,)),
        "(B, 1, ...)": (2, (*shape[:1], *(1 for _ in shape[1:]))),
        "(1, ..., T)": (1, (*(1 for _ in shape[1:]), *shape[-1:])),
        "last axis only": (0.5, shape[-1:]),
        "leading 1": (0.4, (1, *shape)),
        "wrong": (0.4, (*shape[:-1], (shape[-1] + 1) if shape else 3)),
    }
    kind = bits.pick({name: odds for name, (odds, _) in choices.items()})
    return kind, choices[kind][1]


def _weight(bits, features, shape) -> Any:
    if bits.chance(0.5):
        features["sample_weight"] = "none"
        return None
    kind, weight_shape = _weight_shape(bits, shape)
    odds = {"positive": 6, "arbitrary": 5, "with zeros": 3, "all zero": 0.7}
    values, weight = pick_weights(bits, weight_shape, odds)
    features["sample_weight"] = kind
    features["values of sample_weight"] = values
    return weight.astype(bits.pick({"float32": 6, "float64": 1, "int32": 1}))


def _mask(bits, features, shape) -> np.ndarray | None:
    if bits.chance(0.75):
        features["mask"] = "none"
        return None
    features["mask"], mask_shape = _weight_shape(bits, shape)
    return np.asarray(bits.flags(0.6, mask_shape))
