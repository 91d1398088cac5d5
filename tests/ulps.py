"""The one way results are compared: in units of the last place."""

import numpy as np
import torch


def ulps(got, want, size=None) -> float:
    """The largest error of float32 results, in float32's spacing at `size` (default: at `want`)."""
    got, want = _array(got), _array(want)
    assert got.shape == want.shape, f"shapes {got.shape} and {want.shape}"
    size = np.abs(want) if size is None else np.broadcast_to(_array(size), want.shape)
    assert np.array_equal(np.isfinite(got), np.isfinite(want)), "other entries are finite"
    finite = np.isfinite(want)
    errors = np.abs(got[finite] - want[finite]) / np.spacing(size[finite].astype(np.float32))
    return float(errors.max()) if errors.size else 0.0


def _array(values) -> np.ndarray:
    values = values.detach().cpu().double() if isinstance(values, torch.Tensor) else values
    return np.asarray(values, np.float64)
