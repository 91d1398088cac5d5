"""What a row of predictions is summarised by, and what a module of kernels has.

    N    rows, on any axes: shapes below are (..., C) and (...)
    z    (..., C)   logits, or probabilities if `clip` is given; the class axis is the last
    y    (...)      int64 label
    g    (...)      upstream gradient of the row's loss

A row of C predictions is summarised by three numbers, which give its loss (in nats) and its
gradient:

    logits:         m = max_j z_j   r = sum_{j != y} exp(z_j - m)   p = z_y   e = exp(p - m)
    probabilities:  m = 0           r = sum_{j != y} c_j            p = c_y   e = p

                    c = clip(q, low, high)

    logits:         loss = log(r + e) + (m - p)
                    dz_j = g * exp(z_j - m) / (r + e)          dz_y = -g * r / (r + e)

    probabilities:  loss = log((r + e) / p)
                    dq_j = g * [low <= q_j <= high] / (r + e)
                    dq_y = -g * [low <= q_y <= high] * r / ((r + e) * p)

The second row model is what tf.keras does to probabilities (clip, log, softmax cross-entropy)
without its logarithms and its softmax.

`r` is added up without the label's own term, so the gradient at the label is not a difference of
two numbers that may be nearly equal. (m, r) is kept for the backward pass and not the logsumexp
m + log s: for logits with an offset of 1e5 that keeps the gradient's relative error at 7.5e-7, not
3.9e-3. The loss of logits is log s + (m - p), not (m + log s) - p, which is off by 5e-4 at an
offset of 1e4. The loss of probabilities takes one logarithm: log s and log p are both near -15
where all the probabilities are tiny, and their difference keeps only the digits that -15 leaves.

Summaries of disjoint slices of the classes merge (`aten.merge`), as those of a kernel's lanes, and
of several ranks. A slice without the label has no p: minus infinity for logits, 0 for
probabilities. Whether a label is in [0, C) is checked after the merge.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

Clip = tuple[float, float] | None  # None: logits; the inclusive bounds of probabilities
Saved = tuple[Tensor, ...]


class Summary(NamedTuple):
    """(m, r, p) of every row, (...) each, in the dtype that rows are computed in."""

    m: Tensor
    r: Tensor
    p: Tensor


class Kernels(Protocol):
    """A module for rows with a label.

    `counted`, (...) bool, is false for rows with loss 0 and gradient 0, for any values; None: all
    count. In a row that counts, a label outside [0, C) makes loss and gradient NaN.
    """

    @staticmethod
    def forward(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> tuple[Tensor, Saved]:
        """The loss of every row, (...), and what `backward` needs: a `Summary`, or less."""
        ...

    @staticmethod
    def backward(
        g: Tensor,
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        saved: Saved,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient with respect to z, in z's shape and dtype, every element written.

        It is written to `out` if that is given, a tensor as z, or z itself.
        """
        ...

    @staticmethod
    def sums_of(saved: Saved) -> tuple[Tensor, Tensor]:
        """m and r of every row, from what `forward` saved."""
        ...

    @staticmethod
    def saved_of(m: Tensor, r: Tensor, q: Tensor, clip: Clip) -> Saved:
        """What `backward` needs, from m, r and the prediction of the label."""
        ...


class TargetKernels(Protocol):
    """A module for rows with a target for every class, t (..., C): see `targets`.

    t may also be labels y (...) that are to be smoothed.
    """

    @staticmethod
    def forward(
        z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
    ) -> tuple[Tensor, Saved]:
        """The loss of every row, (...), and what `backward` needs."""
        ...

    @staticmethod
    def backward(
        g: Tensor,
        z: Tensor,
        t: Tensor,
        counted: Tensor | None,
        clip: Clip,
        smoothing: float,
        needs: tuple[bool, bool],
        saved: Saved,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dz and dt in the shapes and dtypes of z and t; None for one that is not needed.

        dz is written to `out` if that is given, as that of `Kernels` is.
        """
        ...


class SmoothedLabels(NamedTuple):
    """Kernels for labels that are smoothed, by those for targets."""

    kernels: TargetKernels
    smoothing: float

    def forward(
        self, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip
    ) -> tuple[Tensor, Saved]:
        return self.kernels.forward(z, y, counted, clip, self.smoothing)

    def backward(
        self,
        g: Tensor,
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        saved: Saved,
        out: Tensor | None = None,
    ) -> Tensor:
        needs = (True, False)
        dz, _ = self.kernels.backward(g, z, y, counted, clip, self.smoothing, needs, saved, out)
        assert dz is not None
        return dz


def sums(summary: Summary, clip: Clip) -> Tensor:
    """s = r + e of whole rows."""
    m, r, p = summary
    return r + ((p - m).exp() if clip is None else p)


def loss_of(summary: Summary, clip: Clip) -> Tensor:
    """The loss of whole rows whose label is in [0, C)."""
    m, _, p = summary
    s = sums(summary, clip)
    return s.log() + (m - p) if clip is None else (s / p).log()
