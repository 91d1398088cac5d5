"""The rules of tf.keras's sparse categorical cross-entropy in float64, one sample at a time.

Written from Keras's documentation and its measured behaviour, with loops, so that it can be read
beside them. It shares no code with the package.
"""

import math

import numpy as np


def sample(row, label: int, from_logits: bool, epsilon: float = 1e-7) -> tuple[float, np.ndarray]:
    """The loss of one row of predictions, and its derivative with respect to the row."""
    row = [float(x) for x in row]
    if from_logits:
        largest = max(row)
        total = math.fsum(math.exp(z - largest) for z in row)
        loss = math.log(total) + largest - row[label]
        slope = [math.exp(z - largest) / total for z in row]
        slope[label] -= 1
    else:
        clipped = [min(max(q, epsilon), 1 - epsilon) for q in row]
        total = math.fsum(clipped)
        loss = math.log(total) - math.log(clipped[label])
        slope = [1 / total for _ in row]
        slope[label] -= 1 / clipped[label]
        slope = [d if epsilon <= q <= 1 - epsilon else 0.0 for d, q in zip(slope, row, strict=True)]
    return loss, np.array(slope)


def target_sample(row, targets, from_logits: bool, smoothing: float = 0.0, epsilon: float = 1e-7):
    """The loss of one row for targets, its derivatives by the row and by the targets."""
    row = [float(x) for x in row]
    smooth = [float(t) * (1 - smoothing) + smoothing / len(row) for t in targets]
    if from_logits:
        largest = max(row)
        total = math.fsum(math.exp(z - largest) for z in row)
        logarithms = [z - largest - math.log(total) for z in row]
        slope = [math.fsum(smooth) * math.exp(z - largest) / total - t
                 for z, t in zip(row, smooth, strict=True)]  # fmt: skip
    else:
        total = math.fsum(row)
        normal = [q / total for q in row]
        clipped = [min(max(n, epsilon), 1 - epsilon) for n in normal]
        logarithms = [math.log(c) for c in clipped]
        # By the chain rule: through the logarithm, the clip and the division by the sum.
        inner = [-t / c if c == n else 0.0
                 for t, c, n in zip(smooth, clipped, normal, strict=True)]  # fmt: skip
        shared = math.fsum(d * q for d, q in zip(inner, row, strict=True)) / total**2
        slope = [d / total - shared for d in inner]
    loss = -math.fsum(t * logarithm for t, logarithm in zip(smooth, logarithms, strict=True))
    return loss, np.array(slope), -(1 - smoothing) * np.array(logarithms)


def losses(y_true, y_pred, from_logits=False, ignore_class=None, axis=-1, mask=None):
    """Per sample: the losses, their derivatives in `y_pred`'s layout, and which samples count."""
    y_pred = np.moveaxis(np.asarray(y_pred, np.float64), axis, -1)
    y_true = np.asarray(y_true).reshape(y_pred.shape[:-1])
    out, slopes = np.zeros(y_true.shape), np.zeros(y_pred.shape)
    counts = np.zeros(y_true.shape, bool)
    for at in np.ndindex(y_true.shape):
        if ignore_class is not None and y_true[at] == ignore_class:
            continue
        if mask is not None and not np.broadcast_to(mask, y_true.shape)[at]:
            continue
        counts[at] = True
        out[at], slopes[at] = sample(y_pred[at], int(y_true[at]), from_logits)
    return out, np.moveaxis(slopes, -1, axis), counts


def loss(y_true, y_pred, sample_weight=None, mask=None, *, reduction="sum_over_batch_size",
         upstream=1.0, **options):  # fmt: skip
    """The value and its gradient, for weights and masks that broadcast to the losses as they are.

    `upstream` is what the value is multiplied by before differentiation.
    """
    axis = options.get("axis", -1)
    each, slopes, counts = losses(y_true, y_pred, mask=mask, **options)
    masked = mask is not None or options.get("ignore_class") is not None
    weights = (
        np.ones(each.shape) if sample_weight is None else np.asarray(sample_weight, np.float64)
    )
    weights_sum = (weights * counts).sum() if masked else weights.sum()
    factor = np.broadcast_to(weights, each.shape) * counts
    if reduction not in ("none", None):
        divisor = {
            "sum": 1.0,
            "mean": counts.sum(),
            "sum_over_batch_size": counts.sum(),
            "mean_with_sample_weight": weights_sum,
        }[reduction]
        factor = factor / divisor if divisor else factor * 0
    value = each * factor
    gradient = slopes * np.expand_dims(factor * upstream, axis)
    return (value if reduction in ("none", None) else value.sum()), gradient
