"""A Keras in a separate process, `worker.py`, which gets cases and returns answers."""

import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Self

from .answers import Answer, OracleError
from .cases import Case

TARGET = "tf.keras"
LIVE = (TARGET, "tf_keras", "keras-torch", "keras-jax")
WORKER = Path(__file__).with_name("worker.py")
INSTALL = {
    "tf.keras": "pip install '.[tensorflow]'",
    "tf_keras": "pip install '.[tensorflow]'",
    "keras-torch": "pip install keras",
    "keras-jax": "pip install keras jax",
}


class LiveOracle:
    """A Keras in a subprocess, which gets a batch of cases at a time.

    It gets the next batches before its answers to one are read, so that it need not wait. Use as
    a context manager. Errors in the process are raised as an `OracleError`.
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
        self.unread = 0  # batches that are sent and not answered
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
        for thread in self.threads:  # a grandchild may hold the pipes open: leave them
            thread.join(timeout=1)
        if not any(thread.is_alive() for thread in self.threads):
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert stream is not None
                with suppress(OSError):
                    stream.close()

    def can_answer(self, case: Case) -> bool:
        return case.head is None or self.name == TARGET

    def answers(self, cases: Iterable[Case]) -> Iterator[Answer]:
        """An answer to each case, in order. One call at a time."""
        while self.unread:  # by a caller that stopped early
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
        with suppress(subprocess.TimeoutExpired):  # it may be exiting, or be stuck
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
        except Exception:  # the end, or not a message: nothing more can be read
            self.replies.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        try:
            for line in self.process.stderr:
                self.log = [*self.log[-50:], line]
        except ValueError:  # closed while reading
            pass


def _question(case: Case) -> dict[str, Any]:
    """What the worker needs from a case, as plain values: it does not import this package."""
    keys = ("name", "function", "form", "options", "as_lists", "upstream", "is_loss", "is_sparse")
    question = {key: getattr(case, key) for key in keys}
    question["head"] = None if case.head is None else vars(case.head)
    question["steps"] = [None if batch is None else vars(batch) for batch in case.steps]
    return question
