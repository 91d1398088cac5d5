"""Writes and reads tf.keras's recorded answers."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .answers import Answer, OracleError
from .cases import Case

RECORDED = Path(__file__).with_name("recorded.npz")
STORED = ("float32", "float64", "int32")
WHOLE = 600  # entries of a gradient that are all recorded; of a larger one some are


class RecordedOracle:
    """tf.keras's recorded answers, for machines without TensorFlow."""

    name = "recorded"

    def __init__(self, path: Path = RECORDED) -> None:
        if not path.exists():
            raise OracleError(
                f"there are no recorded answers at {path}: they are in the repository and not in "
                "the wheel. Run this in a clone, or record them where tf.keras is installed: "
                "python -m torch_sce.crosscheck --record"
            )
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(bytes(stored["about"]))
            self.flat = {dtype: stored[dtype] for dtype in STORED}
        self.seed, self.versions, self.entries = about["seed"], about["versions"], about["entries"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def can_answer(self, case: Case) -> bool:
        return case.head is None

    def answers(self, cases: Iterable[Case]) -> Iterator[Answer]:
        """An answer to each case, in order.

        Raises:
            OracleError: a case that was not recorded, or that is now drawn differently.
        """
        for case in cases:
            self.require_recorded(case.seed, case.index)
            fingerprint, fields, arrays = self.entries[case.index]
            if fingerprint != case.fingerprint:
                raise OracleError(
                    f"case {case.index} of --seed {case.seed} is not the one that was recorded: "
                    "how cases are drawn has changed; record again"
                )
            found: dict[str, Any] = {key: self._array(*where) for key, where in arrays.items()}
            yield Answer(**fields, **found)

    def require_recorded(self, seed: int, index: int) -> None:
        if seed != self.seed or index >= len(self.entries):
            raise OracleError(
                f"answers are recorded for --seed {self.seed} and cases below "
                f"{len(self.entries)}, not for --seed {seed}, case {index}"
            )

    def _array(self, dtype: str, start: int, shape: list[int]) -> np.ndarray:
        return self.flat[dtype][start : start + int(np.prod(shape))].reshape(shape)


def record(
    path: Path, cases: Sequence[Case], answers: Sequence[Answer], versions: dict[str, str]
) -> None:
    """Writes answers to cases 0, 1, ... of one seed where `RecordedOracle` finds them."""
    flat: dict[str, list[np.ndarray]] = {dtype: [] for dtype in STORED}
    used = dict.fromkeys(STORED, 0)
    entries = []
    for case, answer in zip(cases, answers, strict=True):
        fields, arrays = {}, {}
        for key, value in vars(thinned(case, answer)).items():
            if isinstance(value, np.ndarray):
                dtype = value.dtype.name if value.dtype.name in STORED else "float32"
                flat[dtype].append(value.astype(dtype).ravel())
                arrays[key] = [dtype, used[dtype], list(value.shape)]
                used[dtype] += value.size
            elif value:
                fields[key] = value
        entries.append([case.fingerprint, fields, arrays])
    about = {"seed": cases[0].seed, "versions": versions, "entries": entries}
    arrays: dict[str, Any] = {
        dtype: np.concatenate([*flat[dtype], np.empty(0, dtype)]) for dtype in STORED
    }
    text = json.dumps(about, separators=(",", ":")).encode()
    np.savez_compressed(path, about=np.frombuffer(text, np.uint8), **arrays)


def thinned(case: Case, answer: Answer) -> Answer:
    """The answer as it is recorded: of a gradient of more than `WHOLE` entries every k-th, and the
    largest of every k-th row, which is mostly at its label.
    """
    parts = {}
    for part in ("gradient", "target_gradient"):
        gradient = getattr(answer, part)
        if gradient is None or gradient.size <= WHOLE:
            continue
        places = np.arange(gradient.size).reshape(gradient.shape)
        axis = case.options["axis"]
        largest = np.abs(gradient).argmax(axis, keepdims=True)
        labels = np.take_along_axis(places, largest, axis).ravel()
        # Odd, so that the entries are not of the same few classes in every row.
        every = places.ravel()[:: -(-gradient.size * 2 // WHOLE) | 1]
        labels = labels[:: -(-labels.size * 4 // WHOLE)]
        chosen = np.union1d(every, labels).astype(np.int32)
        parts |= {part: gradient.ravel()[chosen], f"{part}_places": chosen}
    return replace(answer, **parts)
