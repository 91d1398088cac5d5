"""The results of many cases, added up.

Parts of a run are tallies, too, and are merged in any order: several processes may compare, and a
run may be interrupted and resumed. A tally does not grow with the number of cases, only with that
of features and of different errors in hundredths of an ulp.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from .cases import Case
from .compare import AGREES, DELIBERATE, MISMATCH, Verdict
from .draw import is_everyday

PARTS = ("value", "gradient")
WHO = ("ours", "Keras")
KEPT = 200  # mismatches with their reasons; all others are counted
POINTS = 5000  # cases whose errors are plotted one by one, and whose verdicts are kept

Ranges = list[tuple[int, int]]  # of case numbers [start, stop), in order, with gaps between them


@dataclass
class Row:
    """The cases that share a feature."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def merge(self, other: "Row") -> None:
        self.cases += other.cases
        self.outcomes.update(other.outcomes)
        for key, ulps in other.worst.items():
            self.worst[key] = max(ulps, self.worst.get(key, 0.0))


@dataclass(frozen=True, order=True)
class Mismatch:
    seed: int
    case: int
    reason: str


@dataclass(frozen=True, order=True)
class Point:
    """The errors of one case, by "ours, value", ..."""

    seed: int
    case: int
    classes: int
    ulps: dict[str, float] = field(compare=False)


class Judged(NamedTuple):
    """The verdict on one case."""

    seed: int
    case: int
    name: str  # of the loss or metric
    outcome: str
    reason: str


@dataclass
class Kind:
    """The cases in which another Keras differs from tf.keras in the same way; the first one."""

    cases: int
    first: tuple[int, int, str]  # seed, number, in what

    def merge(self, other: "Kind") -> None:
        self.cases += other.cases
        self.first = min(self.first, other.first)


@dataclass
class Tally:
    """The results of the cases in `finished`, ranges of numbers by seed."""

    finished: dict[int, Ranges] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # differences by name, and "raises"
    features: dict[str, dict[str, Row]] = field(default_factory=dict)
    hundredths: dict[str, Counter[int]] = field(default_factory=dict)  # of an ulp
    nearer: Counter[str] = field(default_factory=Counter)  # whose error is smaller in which part
    points: list[Point] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    everyday: Counter[str] = field(default_factory=Counter)  # outcomes
    mismatches: list[Mismatch] = field(default_factory=list)
    kinds: dict[str, Kind] = field(default_factory=dict)
    differ: dict[tuple[str, str], Counter[bool]] = field(default_factory=dict)  # by feature

    @property
    def cases(self) -> int:
        return self.outcomes.total()

    def add(self, verdict: Verdict) -> None:
        case, ulps = verdict.case, verdict.ulps
        self.outcomes[verdict.outcome] += 1
        name = case.features.get("loss", case.name)
        self.judged.append(Judged(case.seed, case.index, name, verdict.outcome, verdict.reason))
        row = Row(1, Counter([verdict.outcome]), dict(ulps))
        for feature, value in case.features.items():
            self._row(feature, value).merge(row)
        for key, error in ulps.items():
            self.hundredths.setdefault(key, Counter())[round(100 * error)] += 1
        if is_everyday(case):
            self.everyday[verdict.outcome] += 1
            for part, error in verdict.apart.items():
                self.hundredths.setdefault(f"apart, {part}", Counter())[round(100 * error)] += 1
        for part in PARTS:
            found = [ulps[f"{who}, {part}"] for who in WHO if f"{who}, {part}" in ulps]
            if len(found) == len(WHO) and found[0] != found[1]:
                self.nearer[f"{WHO[int(np.argmin(found))]}, {part}"] += 1
        if ulps:
            shape, axis = case.y_pred.shape, case.options.get("axis", -1)
            # Predictions (B,) with targets (B, 1) are those of one class, on an axis of their own.
            classes = shape[axis] if -len(shape) <= axis < len(shape) else 1
            rounded = {key: float(f"{error:.4g}") for key, error in ulps.items()}
            self.points.append(Point(case.seed, case.index, classes, rounded))
        if verdict.outcome == MISMATCH:
            self.mismatches.append(Mismatch(case.seed, case.index, verdict.reason))
        elif verdict.reason:
            self.reasons[verdict.reason] += 1

    def add_comparison(self, case: Case, kind: str, text: str) -> None:
        """Another Keras and tf.keras: how they differ; `kind` is empty if they agree."""
        if kind:
            first = Kind(1, (case.seed, case.index, text))
            self.kinds.setdefault(kind, Kind(0, first.first)).merge(first)
        for feature in case.features.items():
            self.differ.setdefault(feature, Counter())[bool(kind)] += 1

    def merge(self, other: Self) -> None:
        for seed, ranges in other.finished.items():
            self.finished[seed] = joined(self.finished.get(seed, []) + ranges)
        self.outcomes += other.outcomes
        self.reasons += other.reasons
        for feature, rows in other.features.items():
            for value, row in rows.items():
                self._row(feature, value).merge(row)
        for key, counts in other.hundredths.items():
            self.hundredths.setdefault(key, Counter()).update(counts)
        self.nearer += other.nearer
        self.points = sorted(self.points + other.points)[:POINTS]
        self.judged = sorted(self.judged + other.judged)[:POINTS]
        self.everyday += other.everyday
        self.mismatches = sorted(self.mismatches + other.mismatches)[:KEPT]
        for name, kind in other.kinds.items():
            self.kinds.setdefault(name, Kind(0, kind.first)).merge(kind)
        for key, counts in other.differ.items():
            self.differ.setdefault(key, Counter()).update(counts)

    def _row(self, feature: str, value: str) -> Row:
        rows = self.features.setdefault(feature, {})
        if value not in rows:
            rows[value] = Row()
        return rows[value]

    def errors(self, who: str, part: str) -> np.ndarray:
        """In ulps, of every case that has a float64 answer and agrees, in order of size.

        Of "apart", who is no one: how far the two are apart in everyday cases.
        """
        counts = self.hundredths.get(f"{who}, {part}", {})
        sizes = sorted(counts)
        return np.repeat(np.array(sizes, float) / 100, [counts[size] for size in sizes])

    def to_json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "finished": {str(seed): ranges for seed, ranges in self.finished.items()},
            "outcomes": {key: self.outcomes[key] for key in (AGREES, DELIBERATE, MISMATCH)},
            "reasons": dict(self.reasons),
            "features": {
                feature: {
                    value: {"cases": row.cases, **row.outcomes, "worst ulps": row.worst}
                    for value, row in rows.items()
                }
                for feature, rows in self.features.items()
            },
            "hundredths": {key: dict(sorted(n.items())) for key, n in self.hundredths.items()},
            "nearer": dict(self.nearer),
            "verdicts": self.judged,
            "everyday": dict(self.everyday),
            "points": [[p.seed, p.case, p.classes, p.ulps] for p in self.points],
            "mismatches": [vars(mismatch) for mismatch in self.mismatches],
            "kinds": {name: [kind.cases, *kind.first] for name, kind in self.kinds.items()},
            "differ": sorted([*key, n[False], n[True]] for key, n in self.differ.items()),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """What `to_json` gave, as JSON has it: keys are text, tuples are lists."""
        tally = cls(
            finished={int(s): [(a, b) for a, b in r] for s, r in stored["finished"].items()},
            outcomes=+Counter(stored["outcomes"]),
            reasons=Counter(stored["reasons"]),
            nearer=Counter(stored["nearer"]),
            points=[Point(*point) for point in stored["points"]],
            judged=[Judged(*each) for each in stored["verdicts"]],
            everyday=Counter(stored["everyday"]),
            mismatches=[Mismatch(m["seed"], m["case"], m["reason"]) for m in stored["mismatches"]],
            kinds={name: Kind(n, (*first,)) for name, (n, *first) in stored["kinds"].items()},
            differ={(f, v): Counter({False: n, True: m}) for f, v, n, m in stored["differ"]},
        )
        for key, counts in stored["hundredths"].items():
            tally.hundredths[key] = Counter({int(size): n for size, n in counts.items()})
        for feature, rows in stored["features"].items():
            for value, row in rows.items():
                outcomes = {key: row[key] for key in (AGREES, DELIBERATE, MISMATCH) if key in row}
                tally._row(feature, value).merge(
                    Row(row["cases"], Counter(outcomes), row["worst ulps"])
                )
        return tally


def joined(ranges: Ranges) -> Ranges:
    """The same numbers in as few ranges as there can be, in order."""
    result: Ranges = []
    for start, stop in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return result


def gaps(ranges: Ranges, stop: int) -> Iterator[tuple[int, int]]:
    """What is missing in the ranges from 0 to `stop`."""
    at = 0
    for first, last in [*ranges, (stop, stop)]:
        if at < min(first, stop):
            yield at, min(first, stop)
        at = max(at, last)
