"""Whom to ask: a Keras in a process of its own, answers on file, and ourselves."""

import importlib
import json
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from .cases import Batch, Case

TARGET = "tf.keras"
STORED = ("float32", "float64", "int32")
LIVE = (TARGET, "tf_keras", "keras-torch", "keras-jax")
FLOAT64 = "float64"  # asks nobody: the rules of `reference` alone
WHOLE = 600  # entries of a gradient that are recorded; of a larger one some are
RECORDED = Path(__file__).with_name("recorded.npz")
WORKER = Path(__file__).with_name("worker.py")
INSTALL = {
    "tf.keras": "pip install '.[tensorflow]'",
    "tf_keras": "pip install '.[tensorflow]'",
    "keras-torch": "pip install keras",
    "keras-jax": "pip install keras jax",
}


class OracleError(RuntimeError):
    """The oracle is not installed, has crashed, or has no answer on file."""


@dataclass(frozen=True)
class Answer:
    """A value and its gradients with respect to y_pred and to targets, or an error.

    The value of a metric are its results after each update. Half-precision results are carried
    in float32; the dtype's name says what they were. Of a large gradient that was recorded there
    are some entries only, and their places in the flattened gradient.
    """

    value: np.ndarray | None = None
    value_dtype: str | None = None
    gradient: np.ndarray | None = None
    gradient_dtype: str | None = None
    target_gradient: np.ndarray | None = None
    target_gradient_dtype: str | None = None
    error: str | None = None
    message: str = ""
    gradient_places: np.ndarray | None = None
    target_gradient_places: np.ndarray | None = None

    def have(self, part: str, array: np.ndarray) -> np.ndarray:
        """The entries of an array of that gradient's shape for which this answer has the part's."""
        places = getattr(self, f"{part}_places", None)
        return array if places is None or array.shape == places.shape else array.ravel()[places]


class LiveOracle:
    """A Keras in a subprocess of its own, asked a batch of cases at a time.

    It has the next batches before the answers to one are taken, so that it need not wait. Use as
    a context manager. What goes wrong in the process is raised as an `OracleError`.
    """

    batch_size = 10
    batches_ahead = 3
    start_timeout = 180.0  # seconds; importing TensorFlow takes 3 to 60
    batch_timeout = 120.0

    def __init__(self, name: str, worker: Path = WORKER) -> None:
        self.name = name
        command = [sys.executable, str(worker), name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.questions: queue.Queue[Any] = queue.Queue()
        self.replies: queue.Queue[Any] = queue.Queue()
        self.unread = 0  # batches that are asked and not answered
        self.log: list[bytes] = []
        self.threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._send_questions, self._read_replies, self._read_log)
        ]
        for thread in self.threads:
            thread.start()
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            hello = self._reply(self.start_timeout)
            if "missing" in hello:
                raise OracleError(
                    f"the oracle {self.name} is not installed ({hello['missing']}): "
                    f"{INSTALL[self.name]}, or pass --oracle recorded"
                )
        except BaseException:
            self.__exit__()
            raise
        self.versions = hello["versions"]
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.questions.put(None)
        for thread in self.threads:  # a grandchild may hold the pipes open: then let them be
            thread.join(timeout=1)
        if not any(thread.is_alive() for thread in self.threads):
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert stream is not None
                with suppress(OSError):
                    stream.close()

    def answers(self, cases: Iterable[Case]) -> Iterator[Answer]:
        """An answer to each case, in order. One call at a time."""
        while self.unread:  # by a caller who wanted no more
            self._reply(self.batch_timeout)
        cases, sizes = iter(cases), deque()
        while True:
            while self.unread < self.batches_ahead and (batch := [*islice(cases, self.batch_size)]):
                self.questions.put([_question(case) for case in batch])
                self.unread += 1
                sizes.append(len(batch))
            if not self.unread:
                return
            replies = self._reply(self.batch_timeout)
            if not isinstance(replies, list) or len(replies) != sizes.popleft():
                raise OracleError(f"the oracle {self.name} gave no answer to each of its cases")
            for reply in replies:
                yield Answer(**reply)

    def _send_questions(self) -> None:
        """A pipe holds less than a batch: the reader must not wait for a worker that is stuck."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):  # the reader notices that the worker has gone
            while (batch := self.questions.get()) is not None:
                pickle.dump(batch, self.process.stdin)
                self.process.stdin.flush()

    def _reply(self, timeout: float) -> Any:
        try:
            reply = self.replies.get(timeout=timeout)
        except queue.Empty:
            self.process.kill()
            raise OracleError(f"the oracle {self.name} gave no answer in {timeout:.0f} s") from None
        if reply is None:
            raise self._crashed()
        self.unread = max(self.unread - 1, 0)  # the first one is the greeting
        return reply

    def _crashed(self) -> OracleError:
        with suppress(subprocess.TimeoutExpired):  # it may be on its way out, or alive and lost
            self.process.wait(timeout=1)
        self.process.kill()
        code = self.process.wait()
        last = b"".join(self.log).decode(errors="replace").strip().splitlines()[-5:]
        return OracleError(
            "\n".join(
                [f"the oracle {self.name} crashed with exit code {code}; it last said:", *last]
            )
        )

    def _read_replies(self) -> None:
        try:
            while True:
                self.replies.put(pickle.load(self.process.stdout))  # pyright: ignore[reportArgumentType] a pipe
        except Exception:  # the end, or what is no message: either way nothing more can be read
            self.replies.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        try:
            for line in self.process.stderr:
                self.log = [*self.log[-50:], line]
        except ValueError:  # closed under the reader
            pass


def _question(case: Case) -> dict[str, Any]:
    """What the worker needs of a case, in plain values: it does not import this package."""
    keys = ("name", "function", "form", "options", "as_lists", "upstream", "is_loss", "is_sparse")
    question = {key: getattr(case, key) for key in keys}
    question["steps"] = [None if batch is None else vars(batch) for batch in case.steps]
    return question


class RecordedOracle:
    """tf.keras's answers on file, for machines without TensorFlow."""

    name = "recorded"

    def __init__(self, path: Path = RECORDED) -> None:
        if not path.exists():
            raise OracleError(
                f"there are no recorded answers at {path}: they are in the repository and not in "
                "the wheel. Run this in a clone, or record them where tf.keras is installed: "
                "python -m torch_sce.crosscheck.command --record"
            )
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(bytes(stored["about"]))
            self.flat = {dtype: stored[dtype] for dtype in STORED}
        self.seed, self.versions, self.entries = about["seed"], about["versions"], about["entries"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def answers(self, cases: Iterable[Case]) -> Iterator[Answer]:
        """An answer to each case, in order.

        Raises:
            OracleError: a case that was not recorded, or that is drawn differently today.
        """
        for case in cases:
            if case.seed != self.seed or case.index >= len(self.entries):
                raise OracleError(
                    f"answers are recorded for --seed {self.seed} and cases below "
                    f"{len(self.entries)}, not for --seed {case.seed}, case {case.index}"
                )
            fingerprint, fields, arrays = self.entries[case.index]
            if fingerprint != case.fingerprint:
                raise OracleError(
                    f"case {case.index} of --seed {case.seed} is not the one that was recorded: "
                    "how cases are drawn has changed; record again"
                )
            found: dict[str, Any] = {key: self._array(*where) for key, where in arrays.items()}
            yield Answer(**fields, **found)

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
        # Odd, so that not the same few classes of every row are taken.
        every = places.ravel()[:: -(-gradient.size * 2 // WHOLE) | 1]
        labels = labels[:: -(-labels.size * 4 // WHOLE)]
        chosen = np.union1d(every, labels).astype(np.int32)
        parts |= {part: gradient.ravel()[chosen], f"{part}_places": chosen}
    return replace(answer, **parts)


def ours(case: Case, device: str = "cpu", package: ModuleType | None = None) -> Answer:
    """What `package`, torch_sce unless another is given, makes of the case."""
    if package is None:
        import torch_sce as package
    try:
        if case.is_loss:
            return _loss(case, device, package)
        if case.form == "function":
            y_true, y_pred = _tensors(case.batch, device)
            return _answer(value=getattr(package, case.function)(y_true, y_pred, **case.options))
        return _metric(case, device, package)
    except (ValueError, TypeError) as error:
        return Answer(error=type(error).__name__, message=str(error))
    except Exception as error:  # not an error we mean to raise: never the right answer
        return Answer(error=f"unintended {type(error).__name__}", message=str(error))


def _loss(case: Case, device: str, package: ModuleType) -> Answer:
    t, x = y_true, y_pred = _tensors(case.batch, device)
    if x.is_floating_point():
        x.requires_grad_()
    if t.is_floating_point() and not case.is_sparse:
        t.requires_grad_()
    if case.as_lists:
        y_true, y_pred = case.y_true.tolist(), case.y_pred.tolist()
    if case.form == "function":
        value = getattr(package, case.function)(y_true, y_pred, **case.options)
    else:
        loss = getattr(package, case.name)(**case.options)
        mask = None if case.mask is None else _tensor(case.mask, device)
        value = loss(y_true, y_pred, sample_weight=case.sample_weight, mask=mask)
    if value.requires_grad:
        upstream = torch.tensor(case.upstream[: value.numel()], device=device)
        value.backward(upstream.reshape(value.shape).to(value.dtype))
    return _answer(value=value.detach(), gradient=x.grad, target_gradient=t.grad)


def _metric(case: Case, device: str, package: ModuleType) -> Answer:
    metrics = importlib.import_module(f"{package.__name__}.metrics")
    metric = getattr(metrics, case.name)(**case.options).to(device)
    results = []
    for batch in case.steps:
        if batch is None:
            metric.reset_state()
        else:
            y_true, y_pred = _tensors(batch, device)
            if case.as_lists:
                y_true, y_pred = batch.y_true.tolist(), batch.y_pred.tolist()
            mask = None if batch.mask is None else _tensor(batch.mask, device)
            metric.update_state(y_true, y_pred, batch.sample_weight, mask)
        results.append(metric.result())
    return _answer(value=torch.stack(results))


def _answer(**parts: torch.Tensor | None) -> Answer:
    fields = {}
    for name, tensor in parts.items():
        if tensor is not None:
            fields[f"{name}_dtype"] = str(tensor.dtype).removeprefix("torch.")
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            fields[name] = tensor.to(wide).cpu().numpy()
    return Answer(**fields)


def _tensors(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    y_pred = torch.tensor(batch.y_pred, device=device).to(getattr(torch, batch.y_pred_dtype))
    return _tensor(batch.y_true, device), y_pred


def _tensor(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.tensor(np.asarray(array), device=device)


def our_versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch-sce", "torch", "numpy")}
