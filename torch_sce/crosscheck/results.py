"""The results of a run, as numbers and sentences, and their JSON file."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .answers import FLOAT64
from .cases import SCRIPT, command
from .compare import AGREES, DELIBERATE, MISMATCH
from .profiles import PROFILES, Profile
from .tally import PARTS, WHO, Mismatch, Row, Tally

OUTCOMES = {AGREES: "agree", DELIBERATE: "on purpose", MISMATCH: "mismatch"}


@dataclass(frozen=True)
class Setting:
    """The setting of a run. A resumed run has the same."""

    oracle: str
    filters: list[str]
    device: str
    versions: dict[str, str]
    source: str  # a hash of ours
    profile: str


KEYS = [each.name for each in fields(Setting)]


@dataclass
class Results:
    """The results of a run and its setting."""

    tally: Tally
    seeds: range
    setting: Setting
    arguments: list[str]  # of the command line: which oracle and device
    choice: list[str]  # and which cases of the seeds
    seconds: float = 0.0

    @property
    def profile(self) -> Profile:
        return PROFILES[self.setting.profile]

    @property
    def alone(self) -> bool:
        """Whether there is no Keras to compare with."""
        return self.setting.oracle == FLOAT64

    @property
    def who(self) -> tuple[str, ...]:
        """Whose errors are known."""
        return WHO[:1] if self.alone else WHO

    @property
    def mismatches(self) -> int:
        return self.tally.outcomes[MISMATCH]

    def reproduce(self, case: Mismatch) -> str:
        """The command that shows this case."""
        return command(case.seed, case.case, self.arguments)

    @property
    def command(self) -> str:
        """The command that draws all these cases."""
        return shlex.join([*SCRIPT, "--seed", str(self.seeds[0]), *self.choice, *self.arguments])


class Line(NamedTuple):
    """A line of the table by feature: the cases that share a value of it."""

    feature: str  # empty if it is that of the line above
    value: str
    outcomes: Counter[str]
    numbers: list[str]  # cases, those of each outcome, and the worst errors


def lines(results: Results) -> Iterator[Line]:
    """Features in the order in which they were drawn, their values by how often."""
    for feature, rows in results.tally.features.items():
        ordered = sorted(rows.items(), key=lambda item: (-item[1].cases, item[0]))
        for index, (value, row) in enumerate(ordered):
            outcomes = [str(row.outcomes[key] or "") for key in (DELIBERATE, MISMATCH)]
            worst = [_worst(row, who) for who in results.who]
            numbers = [str(row.cases), str(row.outcomes[AGREES]), *outcomes, *worst]
            yield Line("" if index else feature, value, row.outcomes, numbers)


def _worst(row: Row, who: str) -> str:
    found = [row.worst[f"{who}, {part}"] for part in PARTS if f"{who}, {part}" in row.worst]
    return f"{max(found):.1f}" if found else ""


def differences(results: Results) -> Iterator[tuple[str, str, str, int]]:
    """Where, what Keras does, what we do, and in how many cases."""
    reasons = results.tally.reasons
    for each in results.profile.differences:
        yield each.where, each.keras, each.here, reasons[each.name]
    on_a_device = reasons["bad labels on a device"]
    if on_a_device:
        yield "label outside [0, C), on a device", "raises", "NaN in that row", on_a_device


def sentence(results: Results) -> str:
    """How many cases agree, and how."""
    tally, whom = results.tally, "the float64 rules" if results.alone else results.profile.keras
    count, agree, raised = tally.cases, tally.outcomes[AGREES], tally.reasons["raises"]
    on_purpose = "" if results.alone else f"{tally.outcomes[DELIBERATE]} differ on purpose, "
    return (
        f"{agree} of {count} cases agree with {whom} "
        f"({agree - raised} in value and gradient, {raised} in raising an error), {on_purpose}"
        f"{results.mismatches} mismatch{'es' * (results.mismatches != 1)} "
        f"({results.seconds:.0f} s)."
    )


def error_lines(results: Results) -> Iterator[str]:
    """The errors of value and gradient, a sentence each."""
    names = {"ours": "ours", "Keras": results.profile.keras}
    for part in PARTS:
        errors = {who: results.tally.errors(who, part) for who in results.who}
        if errors["ours"].size:
            said = "; ".join(
                f"{names[who]} median {np.median(each):.2f}, "
                f"mean {each.mean():.2f}, largest {each.max():.2f}"
                for who, each in errors.items()
            )
            count = errors["ours"].size
            yield f"Error of the {part} in ulps against float64, {count} float32 cases: {said}."


def everyday(results: Results) -> Iterator[str]:
    """A sentence about everyday use, if there is a Keras and such cases."""
    tally, keras = results.tally, results.profile.keras
    shares = []
    for part, said in zip(PARTS, ("value", "gradient's worst entry"), strict=True):
        apart = tally.errors("apart", part)
        if apart.size:
            exact, one, four = (f"{np.mean(apart <= ulps):.1%}" for ulps in (0, 1, 4))
            shares.append(
                f"The {said} is the same as {keras}'s to the last bit in {exact} of those that "
                f"agree, within 1 ulp in {one}, within 4 in {four}; the largest difference is "
                f"{apart.max():.1f}."
            )
    if shares:
        yield " ".join([
            f"Everyday use (a loss as a class, float32, ordinary values and shapes): "
            f"{tally.everyday[AGREES]} of {tally.everyday.total()} cases agree, "
            f"{tally.everyday[DELIBERATE]} differ on purpose.", *shares,
        ])  # fmt: skip


def to_json(results: Results) -> str:
    """Everything, for programs and for resuming: one line for each part."""
    tally = results.tally
    mismatches = [vars(m) | {"command": results.reproduce(m)} for m in tally.mismatches]
    deliberate = {key: n for key, n in tally.reasons.items() if key != "raises"}
    parts = vars(results.setting) | {
        "seed": results.seeds[0],
        "seconds": round(results.seconds, 1),
        **tally.to_json(),
        "deliberate": deliberate,
        "ulps": {
            f"{who}, {part}": {
                "cases": int(errors.size),
                "median": float(np.median(errors)),
                "mean": float(errors.mean()),
                "largest": float(errors.max()),
            }
            for part in PARTS
            for who in results.who
            if (errors := tally.errors(who, part)).size
        },
        "mismatches": mismatches,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save(results: Results, path: Path) -> None:
    """Writes the file in one step: a reader, or a crash, finds the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(to_json(results))
    os.replace(part, path)


def resume(results: Results, path: Path, cases: int) -> None:
    """Adds the results of a run of the same setting from a file.

    Raises:
        ValueError: the file is not ours, has another setting, or has cases beyond the first `cases`
            of the seeds.
    """
    try:
        stored = json.loads(path.read_text())
        tally = Tally.from_json(stored)
        setting, seconds = Setting(**{key: stored[key] for key in KEYS}), stored["seconds"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of the cross-check ({error!r})") from error
    for key in KEYS:
        there, here = getattr(setting, key), getattr(results.setting, key)
        if there != here:
            raise ValueError(f"{path} was made with {key} {there}, not {here}")
    for seed, ranges in tally.finished.items():
        if seed not in results.seeds or ranges[-1][1] > cases:
            raise ValueError(
                f"{path} has cases of seed {seed} up to {ranges[-1][1] - 1}, not asked for here"
            )
    results.tally.merge(tally)
    results.seconds = seconds
