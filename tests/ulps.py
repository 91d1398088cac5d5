"""The one way results are compared: in units of the last place."""

import numpy as np
import torch


def ulps(got, want, size=None) -> float:
    """The largest error of float32 results, in float32's spacing at `size` (default: at `want`)."""
    if isinstance(got, torch.Tensor):
        got = got.detach().cpu().numpy()
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes {got.shape} and {want.shape}"
    size = np.abs(want) if size is None else np.broadcast_to(size, want.shape)
    assert np.array_equal(np.isfinite(got), np.isfinite(want)), "other entries are finite"
    errors = np.abs(got - want) / np.spacing(size.astype(np.float32))
    errors = errors[np.isfinite(want)]
    return float(errors.max()) if errors.size else 0.0
