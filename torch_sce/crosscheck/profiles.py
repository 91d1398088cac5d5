"""What depends on which Keras this package is compared with: `--profile`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .bounds import Expected, expected
from .cases import Case
from .differences import DIFFERENCES, Difference
from .differences_keras2 import DIFFERENCES_KERAS2
from .draw import with_head
from .draw_keras2 import as_keras2
from .heads import expected_of_head
from .live import TARGET
from .reference_keras2 import expected_keras2
from .reference_metrics import expected_metric


@dataclass(frozen=True)
class Profile:
    """A Keras, and how this package is compared with it."""

    keras: str  # its name, that of the live oracle
    cases: Callable[[Case], Iterator[Case]]  # the cases that are made of one that is drawn
    expected: Callable[[Case, bool], Expected]  # the right answer; may raise Refused
    differences: tuple[Difference, ...]


def _cases_keras3(case: Case) -> Iterator[Case]:
    """The case as drawn and, if it is possible, with a linear head."""
    yield case
    headed = with_head(case)
    if headed is not None:
        yield headed


def _expected_keras3(case: Case, poisons: bool) -> Expected:
    if case.head is not None:
        return expected_of_head(case, poisons)
    return (expected if case.is_loss else expected_metric)(case, poisons)


def _cases_keras2(case: Case) -> Iterator[Case]:
    yield as_keras2(case)


KERAS3, KERAS2 = "keras3", "keras2"
PROFILES = {
    KERAS3: Profile(TARGET, _cases_keras3, _expected_keras3, DIFFERENCES),
    KERAS2: Profile("tf_keras", _cases_keras2, expected_keras2, DIFFERENCES_KERAS2),
}
