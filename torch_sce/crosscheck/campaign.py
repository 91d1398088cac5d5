"""Many cases: compared here or by several processes, a block of numbers at a time.

A case depends only on its seed and number, so a process gets numbers and draws the cases itself; it
returns a `Tally`.
"""

import hashlib
import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, tee
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch

from .answers import FLOAT64, Answer, OracleError, our_versions, ours
from .cases import Case
from .compare import MISMATCH, Verdict, differs, judge, reference
from .draw import draw
from .live import LiveOracle
from .profiles import KERAS3, PROFILES
from .recorded import RecordedOracle
from .tally import Ranges, Tally, gaps

BLOCK = 200  # cases: an interrupted run loses those of an unfinished block


@dataclass(frozen=True)
class Plan:
    """Which oracles to use for which cases, and where to compute."""

    oracle: str
    device: str = "cpu"
    filters: tuple[str, ...] = ()
    profile: str = KERAS3


@dataclass(frozen=True)
class Block:
    """The cases [start, stop) of a seed."""

    seed: int
    start: int
    stop: int


@dataclass(frozen=True)
class Compared:
    """One case, its verdict and the answers to it."""

    verdict: Verdict
    keras: Answer | None  # None: without a Keras
    ours: Answer
    other: Answer | None = None  # of another Keras


@dataclass(frozen=True)
class Oracles:
    """The profile's Keras, live or recorded, and another to compare with it; None: no such one."""

    target: LiveOracle | RecordedOracle | None
    other: LiveOracle | None

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        """By library: the packages of tf.keras and of the other Keras, and ours."""
        return {
            "target": self.target.versions if self.target else {},
            "other": self.other.versions if self.other else {},
            "ours": our_versions(),
        }


@contextmanager
def opened(plan: Plan) -> Iterator[Oracles]:
    """The oracles of a plan, started together."""
    with ExitStack() as stack:
        target = other = None
        with ignoring_interrupts():
            if plan.oracle == "recorded":
                target = RecordedOracle()
            elif plan.oracle != FLOAT64:
                keras = PROFILES[plan.profile].keras
                target = LiveOracle(keras)
                other = LiveOracle(plan.oracle) if plan.oracle != keras else None
        for oracle in (target, other):
            if oracle is not None:
                stack.enter_context(oracle)
        yield Oracles(target, other)


def compare(plan: Plan, oracles: Oracles, block: Block) -> Iterator[Compared]:
    """The cases of a block that the filters keep and all oracles can answer, one by one."""
    cases = drawn(block.seed, range(block.start, block.stop), plan.profile)
    cases = (case for case in cases if is_kept(case, plan.filters))
    asked = [each for each in (oracles.target, oracles.other) if each is not None]
    cases = (case for case in cases if all(each.can_answer(case) for each in asked))
    copies: list[Iterator[Case]] = []
    if asked:  # it reads ahead, and computes while we do
        cases, *copies = tee(cases, 1 + len(asked))
    answers = [each.answers(copy) for each, copy in zip(asked, copies, strict=True)]
    for case in cases:
        keras, other = [*(next(each) for each in answers), None, None][:2]
        mine = ours(case, plan.device)
        yield Compared(_verdict(case, keras, mine, plan.device != "cpu"), keras, mine, other)


def _verdict(case: Case, keras: Answer | None, mine: Answer, poisons: bool) -> Verdict:
    """An error in the comparison itself is a mismatch: it must not end a run of a million."""
    try:
        return judge(case, keras, mine, poisons)
    except Exception as error:
        return Verdict(case, MISMATCH, f"unknown: judging raises {type(error).__name__}: {error}")


def drawn(seed: int, indices: Iterable[int], profile: str = KERAS3) -> Iterator[Case]:
    """The cases of these numbers that the profile has: one or two for each number."""
    for index in indices:
        yield from PROFILES[profile].cases(draw(seed, index))


def names(case: Case) -> set[str]:
    """The case's features as --filter names them."""
    return {f"{feature}: {value}" for feature, value in case.features.items()}


def is_kept(case: Case, filters: Sequence[str]) -> bool:
    return not filters or names(case).issuperset(filters)


def tally_of(block: Block, compared: Iterable[Compared], name: str) -> Tally:
    """The tally of a block; `name` is that of the other Keras."""
    found = Tally(finished={block.seed: [(block.start, block.stop)]})
    for each in compared:
        found.add(each.verdict)
        if each.keras and each.other and each.verdict.outcome != MISMATCH:
            _add_comparison(found, each.verdict.case, each.keras, each.other, name)
    return found


def _add_comparison(found: Tally, case: Case, keras: Answer, other: Answer, name: str) -> None:
    right, _ = reference(case)
    if right is None and not keras.error and not other.error:
        return  # both accept what we refuse: there is no bound for comparing them
    text, kind = differs(keras, other, right, case), ""
    if text and (keras.error or other.error):
        kind = f"only {'tf.keras' if keras.error else name} raises"
    elif text:
        kind = text.split()[0]
    found.add_comparison(case, kind, text or "")


def blocks(seeds: Iterable[int], cases: int, finished: dict[int, Ranges]) -> Iterator[Block]:
    """All of `cases` of each seed that are not finished."""
    for seed in seeds:
        for start, stop in gaps(finished.get(seed, []), cases):
            for at in range(start, stop, BLOCK):
                yield Block(seed, at, min(at + BLOCK, stop))


class Here:
    """Compares in this process; `seen` gets every result. Use as a context manager."""

    def __init__(
        self, plan: Plan, stopped: threading.Event, seen: list[Compared] | None = None
    ) -> None:
        self.plan, self.stopped, self.seen = plan, stopped, seen
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.stack.enter_context(one_thread())
        self.oracles = self.stack.enter_context(opened(self.plan))
        self.versions = self.oracles.versions
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stack.close()

    def run(self, blocks: Iterator[Block]) -> Iterator[Tally]:
        """The tally of each block; ends early, between two cases, when stopped."""
        for block in blocks:
            found = tally_of(block, self._seen(block), self.plan.oracle)
            if self.stopped.is_set():
                return
            yield found

    def _seen(self, block: Block) -> Iterator[Compared]:
        for each in compare(self.plan, self.oracles, block):
            if self.stopped.is_set():
                return
            if self.seen is not None:
                self.seen.append(each)
            yield each


class Workers:
    """Compares in several processes, each with its own oracles. Use as a context manager.

    If one of them ends, an `OracleError` is raised. They end when this process does, for any
    reason: their pipes close.
    """

    def __init__(self, plan: Plan, count: int, stopped: threading.Event) -> None:
        self.stopped = stopped
        context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
        self.processes: dict[Connection, BaseProcess] = {}
        self.versions: dict[str, dict[str, str]] = {"target": {}, "other": {}, "ours": {}}
        with ignoring_interrupts():
            for number in range(1, count + 1):
                pipe, theirs = context.Pipe()
                name = f"worker {number} of {count}"
                process = context.Process(target=work, args=(theirs, plan), name=name)
                process.start()
                theirs.close()
                self.processes[pipe] = process

    def __enter__(self) -> Self:
        try:
            starting = dict.fromkeys(self.processes)
            for pipe in self._ready(starting):
                self.versions = self._received(pipe, "while it started")
                del starting[pipe]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        for pipe, process in self.processes.items():
            pipe.close()
            process.kill()
            process.join()

    def run(self, blocks: Iterator[Block]) -> Iterator[Tally]:
        """The tally of each block, in the order in which they are done; fewer when stopped."""
        busy: dict[Connection, Block] = {}
        for pipe in self.processes:
            self._give(pipe, blocks, busy)
        for pipe in self._ready(busy):
            block = busy.pop(pipe)
            where = f"in cases {block.start} to {block.stop - 1} of --seed {block.seed}"
            found = self._received(pipe, where)
            self._give(pipe, blocks, busy)
            yield found

    def _give(
        self, pipe: Connection, blocks: Iterator[Block], busy: dict[Connection, Block]
    ) -> None:
        for block in islice(blocks, 1):
            with suppress(OSError):  # its end is noticed when it should answer
                pipe.send(block)
            busy[pipe] = block

    def _ready(self, waiting: dict[Connection, Any]) -> Iterator[Connection]:
        """Those of `waiting` that have an answer, until it is empty or the run is stopped."""
        while waiting and not self.stopped.is_set():
            for pipe in wait(list(waiting), timeout=0.2):
                assert isinstance(pipe, Connection)
                if not self.stopped.is_set():  # what stopped the run may have ended the process
                    yield pipe

    def _received(self, pipe: Connection, where: str) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process = self.processes[pipe]
            process.join(timeout=1)
            raise OracleError(
                f"{process.name} has ended with exit code {process.exitcode} {where}"
            ) from None
        if isinstance(message, OracleError):
            raise message
        return message


def work(pipe: Connection, plan: Plan) -> None:
    """A process of `Workers`: gets blocks and gives tallies until the pipe closes."""
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            with one_thread(), opened(plan) as oracles:
                pipe.send(oracles.versions)
                while True:
                    block = pipe.recv()
                    pipe.send(tally_of(block, compare(plan, oracles, block), plan.oracle))
        except OracleError as error:
            pipe.send(error)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: cases are small, and the last digits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C: their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second one ends the program at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        stopped.set()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()


def source() -> str:
    """A hash of the package's source: answers of other code do not belong to the same run."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.*")):
        if path.suffix in (".py", ".c", ".h", ".cpp", ".so"):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
