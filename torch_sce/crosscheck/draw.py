"""Random cases over everything the loss accepts, and much that it must refuse.

A case is drawn from `(seed, index)` alone, so any one can be drawn again by itself. Most options
stay ordinary in most cases: what is odd then meets ordinary company, and two odd things meet
often enough.

Values are chosen so that the answer does not depend on luck. Weights that may add up to zero are
multiples of 1/4, whose sums are exact in any order and dtype: a denominator is zero for everybody
or for nobody.
"""

from typing import Any

import numpy as np

from .cases import LOSSES, Batch, Case, pick, pick_weights, to_bfloat16
from .draw_metrics import draw_metric

REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None)
LABEL_DTYPES = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool")


def draw(seed: int, index: int) -> Case:
    """The case of that number."""
    rng = np.random.default_rng([seed, index])
    what = pick(rng, {"SparseCategoricalCrossentropy": 10, "CategoricalCrossentropy": 4.5, None: 4})
    return draw_metric(rng, seed, index) if what is None else _loss(rng, seed, index, what)


def _loss(rng, seed: int, index: int, name: str) -> Case:
    features = {"loss": name}
    form = features["form"] = pick(rng, {"class": 9, "function": 1})
    from_logits = bool(rng.integers(2))
    features["predictions are"] = "logits" if from_logits else "probabilities"
    options: dict[str, Any] = {"from_logits": from_logits}

    loss_shape, classes = _shape(rng, features)
    y_pred = _predictions(rng, features, from_logits, loss_shape, classes)
    y_pred, y_pred_dtype = _predictions_dtype(rng, features, y_pred)
    if name == LOSSES[0]:
        y_pred, options["axis"] = _axis(rng, features, y_pred, 2)
        y_true, options["ignore_class"] = _labels(rng, features, loss_shape, classes)
        y_true = _label_shape(rng, features, y_true, options["axis"])
    else:
        axes = y_pred.ndim
        y_true = _targets(rng, features, loss_shape, classes)
        y_pred, options["axis"] = _axis(rng, features, y_pred, 6)
        if y_true.ndim == axes and -axes <= options["axis"] < axes:
            y_true = np.moveaxis(y_true, -1, options["axis"])
        options["label_smoothing"] = _smoothing(rng, features)
        y_true, y_pred = _target_shape(rng, features, y_true, y_pred)

    weight = mask = None
    as_lists = False
    if form == "class":
        options["reduction"] = _reduction(rng, features)
        options["dtype"] = pick(
            rng, {None: 20, "float16": 1, "bfloat16": 1, "float32": 1, "float64": 3}
        )
        features["dtype"] = str(options["dtype"])
        weight = _weights(rng, features, loss_shape)
        mask = _mask(rng, features, loss_shape)
    if y_pred_dtype == "float32" and rng.random() < 0.03:
        as_lists, mask = True, None  # lists carry none
    features["given as"] = "lists" if as_lists else "arrays"
    size = max(1, int(np.prod(loss_shape)))
    upstream = rng.choice([-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0], size).astype(np.float32)
    batch = Batch(y_true, y_pred, y_pred_dtype, weight, mask)
    return Case(seed, index, name, form, options, batch, as_lists, upstream, features)


def _shape(rng, features) -> tuple[tuple[int, ...], int]:
    rank = pick(rng, {0: 1, 1: 8, 2: 6, 3: 2})
    loss_shape = tuple(int(n) for n in rng.integers(1, 7, rank))
    classes = int(rng.integers(2, 12))
    kind = pick(rng, {"small": 30, "one class": 2, "no samples": 1, "square": 6, "B = 1": 2,
                       "many samples": 2, "many classes": 2, "no classes": 0.5})  # fmt: skip
    if kind == "one class":
        classes = 1
    elif kind == "no classes":
        classes = 0
    elif kind == "many classes":
        classes, loss_shape = int(rng.integers(200, 3000)), loss_shape[:1]
    elif kind == "many samples":
        loss_shape = (int(rng.integers(200, 800)), *loss_shape[1:2])
    elif kind == "no samples" and rank > 0:
        empty = int(rng.integers(rank))
        loss_shape = tuple(0 if i == empty else n for i, n in enumerate(loss_shape))
    elif kind == "square" and rank > 1:
        loss_shape = loss_shape[:1] * rank
    elif kind == "B = 1" and rank > 0:
        loss_shape = (1, *loss_shape[1:])
    features["size"] = kind
    features["rank of y_pred"] = str(len(loss_shape) + 1)
    return loss_shape, classes


def _predictions(rng, features, from_logits, loss_shape, classes) -> np.ndarray:
    shape = (*loss_shape, classes)
    logits = rng.standard_normal(shape)
    if from_logits:
        kind = pick(rng, {"normal": 8, "wide": 6, "with an offset": 3, "huge": 1, "equal": 1,
                           "with -inf": 2, "with inf": 1, "with nan": 1, "zeros": 1})  # fmt: skip
        if kind == "wide":
            logits *= rng.choice([5.0, 20.0, 100.0])
        elif kind == "with an offset":
            logits = logits * 3 + rng.choice([1e3, -1e4, 1e5])
        elif kind == "huge":
            logits *= rng.choice([1e4, 1e30, 1e33])  # sums of these stay finite
        elif kind == "equal":
            logits = np.broadcast_to(logits[..., :1], shape).copy()
        elif kind == "zeros":
            logits = np.zeros(shape)
        values = _sprinkle(rng, logits, kind)
    else:
        kind = pick(rng, {"softmax": 8, "peaked": 4, "with zeros and ones": 4, "unnormalised": 3,
                           "outside [0, 1]": 2, "at the bounds": 2, "with -inf": 0.7,
                           "with inf": 0.7, "with nan": 1, "uniform": 1})  # fmt: skip
        scale = rng.choice([5.0, 15.0]) if kind == "peaked" else 1.0
        values = np.exp(scale * logits)
        values /= values.sum(-1, keepdims=True)
        if kind == "with zeros and ones" and classes:
            hot = np.eye(classes)[rng.integers(0, classes, loss_shape)]
            values = np.where(rng.random((*loss_shape, 1)) < 0.6, hot, values)
            values = np.where(rng.random(shape) < 0.2, 0.0, values)
        elif kind == "unnormalised":
            values = rng.random(shape)
        elif kind == "outside [0, 1]":
            values = logits * 2
        elif kind == "at the bounds":
            low, high = np.float32(1e-7), np.float32(1 - 1e-7)
            edge = [low, np.nextafter(low, np.float32(0)), np.nextafter(low, np.float32(1)),
                    high, np.nextafter(high, np.float32(0)), np.float32(1), 3e-7]  # fmt: skip
            values = np.where(rng.random(shape) < 0.4, rng.choice(edge, shape), values)
        elif kind == "uniform" and classes:
            values = np.full(shape, 1 / classes)
        values = _sprinkle(rng, values, kind)
    features["values"] = kind
    return values


def _sprinkle(rng, values, kind) -> np.ndarray:
    odd = {"with -inf": -np.inf, "with inf": np.inf, "with nan": np.nan}.get(kind)
    return values if odd is None else np.where(rng.random(values.shape) < 0.15, odd, values)


def _predictions_dtype(rng, features, values) -> tuple[np.ndarray, str]:
    dtype = pick(rng, {"float32": 14, "float16": 1, "bfloat16": 1, "float64": 2, "int32": 0.3})
    features["dtype of y_pred"] = dtype
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            return to_bfloat16(values.astype(np.float32)), dtype
        if dtype == "int32":
            return np.clip(np.nan_to_num(values), -1e6, 1e6).astype(np.int32), dtype
        return values.astype(dtype), dtype


def _axis(rng, features, y_pred, other: float) -> tuple[np.ndarray, int]:
    rank = y_pred.ndim
    kind = pick(rng, {"-1": 30, "last": 3, "other": other, "outside": 0.5})
    axis = -1
    if kind == "last":
        axis = rank - 1
    elif kind == "outside":
        axis = int(rng.choice([rank, rank + 2, -rank - 1]))
    elif kind == "other" and rank > 1:
        axis = int(rng.integers(rank - 1))
        y_pred = np.ascontiguousarray(np.moveaxis(y_pred, -1, axis))
        if rng.random() < 0.5:
            axis -= rank
    features["axis"] = kind
    return y_pred, axis


def _labels(rng, features, loss_shape, classes) -> tuple[np.ndarray, Any]:
    """Labels and the class to ignore, which have to know of each other."""
    labels = rng.integers(0, max(classes, 1), loss_shape)
    kind = pick(rng, {"none": 20, "a class": 3, "-1": 4, "255": 2, "-100": 1, "all": 1,
                       "a float": 1, "absent": 1, "True": 0.5})  # fmt: skip
    ignore = {"-1": -1, "255": 255, "-100": -100, "a float": 1.0, "absent": -7, "True": True}.get(
        kind, int(rng.integers(0, max(classes, 1))) if kind != "none" else None
    )
    if kind == "all":
        labels = np.full(loss_shape, ignore)
    elif ignore is not None and kind != "absent":
        labels = np.where(rng.random(loss_shape) < 0.4, int(ignore), labels)
    features["ignore_class"] = kind

    values = pick(rng, {"valid": 30, "outside": 1.2, "fractional": 2})
    if values == "outside":
        odd = rng.choice([-1, -100, classes, classes + 3, 255])
        labels = np.where(rng.random(loss_shape) < 0.3, odd, labels)
    dtype = pick(rng, {"int64": 10, "int32": 5, "other": 8, "float": 3})
    if values == "fractional":
        dtype = "float"
    if dtype == "other":
        dtype = str(rng.choice(LABEL_DTYPES))
    elif dtype == "float":
        dtype = str(rng.choice(["float32", "float16", "float64"]))
    if not np.issubdtype(np.dtype(dtype), np.floating) and labels.size:
        limits = np.iinfo(dtype) if dtype != "bool" else None
        low, high = (limits.min, limits.max) if limits else (0, 1)
        if labels.min() < low or labels.max() > high:
            dtype = "int64"
    labels = labels.astype(dtype)
    if values == "fractional":
        whole = rng.random(loss_shape) < 0.4
        labels = (labels + np.where(whole, 0, rng.choice([0.25, 0.5, 0.75]))).astype(dtype)
        if rng.random() < 0.3:
            odd = rng.choice([-0.5, -0.9, 1.5, np.nan, np.inf, 1 - 1e-9, 2 - 1e-9])
            labels = np.where(rng.random(loss_shape) < 0.3, odd, labels).astype(dtype)
            ignore = 1.5 if ignore is not None and rng.random() < 0.5 else ignore
    features["labels"] = values
    features["dtype of y_true"] = dtype
    return labels, ignore


def _targets(rng, features, loss_shape, classes) -> np.ndarray:
    shape = (*loss_shape, classes)
    kind = pick(rng, {"one-hot": 8, "soft": 6, "unnormalised": 2, "all zero": 0.7, "signed": 0.5,
                      "with nan": 0.5})  # fmt: skip
    values = np.eye(max(classes, 1))[rng.integers(0, max(classes, 1), loss_shape)]
    values = values[..., :classes]
    if kind == "soft":
        values = rng.dirichlet(np.full(max(classes, 1), 0.5), loss_shape)[..., :classes]
    elif kind == "unnormalised":
        values = rng.random(shape) * 3
    elif kind == "all zero":
        values = values * (rng.random((*loss_shape, 1)) < 0.5)
    elif kind == "signed":
        values = rng.integers(-2, 3, shape) / 2
    elif kind == "with nan":
        values = np.where(rng.random(shape) < 0.1, np.nan, values)
    dtypes = {"float32": 12, "float64": 2, "float16": 1}
    if kind == "one-hot":
        dtypes |= {"int64": 4, "int32": 1, "uint8": 1, "bool": 1}
    dtype = pick(rng, dtypes)
    features["targets"] = kind
    features["dtype of y_true"] = dtype
    return values.astype(dtype)


def _smoothing(rng, features) -> Any:
    smoothing = pick(rng, {0.0: 12, 0.1: 5, 0.3: 2, 1: 0.7, None: 0.5, 1.5: 0.4, -0.1: 0.4})
    features["label_smoothing"] = str(smoothing)
    return smoothing


def _target_shape(rng, features, y_true, y_pred) -> tuple[np.ndarray, np.ndarray]:
    kind = pick(rng, {"plain": 30, "trailing 1": 1, "y_pred has a trailing 1": 1, "class numbers":
                      0.5, "one sample": 0.5, "other classes": 0.5})  # fmt: skip
    features["shape of y_true"] = kind
    if kind == "trailing 1":
        return y_true[..., None], y_pred
    if kind == "y_pred has a trailing 1":
        return y_true, y_pred[..., None]
    if kind == "class numbers":
        return y_true[..., 0] if y_true.shape[-1] else y_true, y_pred
    if kind == "one sample":
        return y_true[:1], y_pred
    if kind == "other classes":
        return np.concatenate([y_true, y_true], -1), y_pred
    return y_true, y_pred


def _label_shape(rng, features, labels, axis) -> np.ndarray:
    kind = pick(rng, {"plain": 20, "trailing 1": 7, "two trailing 1": 1,
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


def _reduction(rng, features) -> Any:
    reduction = pick(
        rng, {**{r: 5 for r in REDUCTIONS}, "sum_over_batch_size": 9, "auto": 1, "average": 0.4}
    )
    features["reduction"] = str(reduction)
    return reduction


def _weight_shape(rng, loss_shape) -> tuple[str, tuple[int, ...]]:
    """The name of a shape, and the shape: all that Keras's rules accept, and some they do not."""
    full = loss_shape
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
    kind = pick(rng, {name: odds for name, (odds, _) in choices.items()})
    return kind, choices[kind][1]


def _weights(rng, features, loss_shape) -> Any:
    if rng.random() < 0.5:
        features["sample_weight"] = "none"
        return None
    kind, shape = _weight_shape(rng, loss_shape)
    odds = {"positive": 5, "arbitrary": 5, "with zeros": 4, "signed": 2, "all zero": 1, "nan": 0.5}
    values, weight = pick_weights(rng, shape, odds)
    features["sample_weight"] = kind
    features["values of sample_weight"] = values
    container = pick(rng, {"float32": 10, "float64": 2, "int32": 1, "bool": 1, "list": 2})
    if container == "list":
        return weight.tolist()
    if container in ("int32", "bool") and values == "nan":
        container = "float32"
    return weight.astype(container)


def _mask(rng, features, loss_shape) -> np.ndarray | None:
    if rng.random() < 0.7:
        features["mask"] = "none"
        return None
    kind, shape = _weight_shape(rng, loss_shape)
    share = pick(rng, {0.6: 10, 0.0: 1, 1.0: 1})
    mask = np.asarray(rng.random(shape) < share)
    dtype = pick(rng, {"bool": 8, "int32": 1, "float32": 1, "half": 0.7})
    features["mask"] = kind
    features["dtype of mask"] = dtype
    return mask * np.float32(0.5) if dtype == "half" else mask.astype(dtype)
