"""Many cases: several processes give what one gives, and a run can be interrupted and resumed."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_sce.crosscheck import answers, campaign, command, tally
from torch_sce.crosscheck import compare as compare_module
from torch_sce.crosscheck.answers import Answer, ours
from torch_sce.crosscheck.campaign import Block, Oracles, Plan, compare, drawn, opened, tally_of
from torch_sce.crosscheck.command import AGREEMENT, DISAGREEMENT, INTERRUPTED, NO_ORACLE, USAGE
from torch_sce.crosscheck.compare import AGREES, MISMATCH, judge
from torch_sce.crosscheck.draw import draw
from torch_sce.crosscheck.live import LiveOracle
from torch_sce.crosscheck.tally import Tally, gaps, joined

SCRIPT = Path(__file__).parent.parent / "scripts" / "cross_check.py"
ALONE = ("--oracle", "float64", "--seed", "3", "--seeds", "2", "--cases", "90")
DRAWN = sum(1 for seed in (3, 4) for _ in drawn(seed, range(90)))  # with and without a head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(campaign, "BLOCK", 20)


@pytest.fixture
def run(capsys, tmp_path):
    """`run(name, ...)`: exit code, what is printed, and the JSON that is written, but for times."""

    def call(name, *arguments):
        path = tmp_path / name
        code = command.main([*ALONE, "--json", str(path), *arguments])
        written = json.loads(path.read_text()) if path.exists() else {}
        written.pop("seconds", None)
        return code, capsys.readouterr().out, written

    return call


@pytest.fixture
def at_merge(monkeypatch):
    """`at_merge(number, action)`: does it after so many blocks have been added up."""

    def call(number, action):
        merge, count = Tally.merge, iter(range(1, 1000))

        def counting(self, other):
            merge(self, other)
            if next(count) == number:
                action()

        monkeypatch.setattr(Tally, "merge", counting)

    return call


def compared(found):
    """Of how many numbers the cases are compared."""
    return sum(stop - start for ranges in found["finished"].values() for start, stop in ranges)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_several_processes_find_what_one_finds(run, one_extension):
    code, out, alone = run("1.json")
    assert code == AGREEMENT and "180 of the cases of --seed 3 to 4" in out
    assert alone["cases"] == DRAWN > 180 and alone["finished"] == {"3": [[0, 90]], "4": [[0, 90]]}
    code, _, together = run("2.json", "--workers", "2")
    assert code == AGREEMENT and together == alone


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_run_that_is_resumed_ends_as_one_that_was_not(
    workers, run, at_merge, one_extension
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    _, _, whole = run("whole.json")
    at_merge(3, interrupt)
    code, out, part = run("parts.json", "--workers", workers)
    assert code == INTERRUPTED == 130 and "for --resume" in out
    assert 0 < part["cases"] < whole["cases"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    code, out, resumed = run("parts.json", "--workers", workers, "--resume")
    assert code == AGREEMENT and "180 of 180 compared" in out and resumed == whole
    code, _, again = run("parts.json", "--resume")  # nothing is left to do
    assert code == AGREEMENT and again == whole


def test_an_interrupted_block_is_drawn_again(run, monkeypatch):
    _, _, whole = run("whole.json")
    calls = iter(range(1, 1000))

    def interrupted(case, device):
        if next(calls) == 1 + sum(1 for _ in drawn(3, range(45))):
            interrupt()
        return answers.ours(case, device)

    monkeypatch.setattr(campaign, "ours", interrupted)
    code, _, part = run("parts.json")
    assert code == INTERRUPTED and part["finished"] == {"3": [[0, 40]]}
    code, _, resumed = run("parts.json", "--resume")
    assert code == AGREEMENT and resumed == whole


@pytest.mark.skipif(sys.platform == "win32", reason="has no process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reaches_all_processes_and_leaves_a_whole_file(number, tmp_path):
    path = tmp_path / "found.json"
    root = SCRIPT.parent.parent
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--oracle", "float64", "--workers", "2", "--cases", "4000",
         "--json", str(path)],
        env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while "compared" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Interrupted: " in out and err == ""
    assert json.loads(path.read_text())["cases"] >= 200
    assert [each.name for each in tmp_path.iterdir()] == ["found.json"]


def test_a_process_that_dies_ends_the_run_and_what_is_finished_is_kept(run, at_merge):
    at_merge(1, lambda: [child.kill() for child in multiprocessing.active_children()])
    code, out, found = run("found.json", "--workers", "2")
    assert code == NO_ORACLE == 3
    assert "of 2 has ended with exit code -9 in cases" in out
    assert 0 < found["cases"] < 180
    assert multiprocessing.active_children() == []


def test_an_oracle_that_fails_in_a_process_is_exit_code_3(run, monkeypatch):
    monkeypatch.setattr(
        command, "_require_recorded", lambda options: None
    )  # said before they start
    code, out, _ = run("found.json", "--oracle", "recorded", "--workers", "2")
    assert code == NO_ORACLE and "answers are recorded for --seed 0" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seed", "4"], "has cases of seed 3 up to 19, not asked for here"),
    (["--cases", "10"], "has cases of seed 3 up to 19, not asked for here"),
    (["--filter", "reduction: sum"], "was made with filters [], not ['reduction: sum']"),
])  # fmt: skip
def test_a_run_goes_on_only_with_what_it_began_with(arguments, message, run, at_merge, capsys):
    at_merge(1, interrupt)
    run("found.json")
    with pytest.raises(SystemExit) as stopped:
        run("found.json", "--resume", *arguments)
    assert stopped.value.code == USAGE
    assert message in capsys.readouterr().err


def test_a_run_goes_on_only_with_its_oracle(run, at_merge, capsys, tensorflow):
    at_merge(1, interrupt)
    run("found.json")
    with pytest.raises(SystemExit) as stopped:
        run("found.json", "--resume", "--oracle", "keras-jax")
    assert stopped.value.code == USAGE
    assert "was made with oracle float64, not keras-jax" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [
    ("versions", {"torch": "1.0"}), ("source", "0"), ("device", "a GPU"), ("points", 3),
    ("finished", []),
])  # fmt: skip
def test_a_file_of_another_setting_or_kind_is_refused(key, value, run, at_merge, tmp_path, capsys):
    at_merge(1, interrupt)
    run("found.json")
    path = tmp_path / "found.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SystemExit) as stopped:
        run("found.json", "--resume")
    assert stopped.value.code == USAGE
    said = capsys.readouterr().err
    assert f"was made with {key}" in said or "holds no results of the cross-check" in said


def test_a_run_to_be_resumed_may_be_the_first(run):
    code, _, found = run("found.json", "--resume", "--cases", "5")
    assert code == AGREEMENT and compared(found) == 10
    code, _, found = run("found.json", "--resume", "--cases", "9", "--seeds", "3")  # and may grow
    assert code == AGREEMENT and compared(found) == 27


@pytest.mark.parametrize("arguments", [
    ["--resume"], ["--case", "3", "--seeds", "2"], ["--workers", "0"], ["--seeds", "0"],
    ["--case", "3", "--resume", "--json", "x.json"], ["--record", "x.npz", "--workers", "2"],
    ["--record", "x.npz", "--seeds", "2"], ["--record", "x.npz", "--resume", "--json", "x.json"],
])  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == USAGE
    assert "error:" in capsys.readouterr().err


def test_without_an_oracle_nothing_is_said_of_keras(run, monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "LiveOracle", None)  # no Keras is run
    page = tmp_path / "page.html"
    code, out, found = run("found.json", "--html", str(page))
    assert code == AGREEMENT
    assert "agree with the float64 rules" in out and "ours median" in out
    assert "agree with the float64 rules" in page.read_text() and "<img" in page.read_text()
    found.pop("versions")
    assert found.pop("profile") == "keras3"
    for text in (out.split("\n", 1)[1], page.read_text(), json.dumps(found)):
        assert "eras" not in text and "on purpose (" not in text


def test_without_an_oracle_a_wrong_answer_is_a_mismatch(run, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "ours", lambda case, device: Answer(np.zeros(7), "float32"))
    monkeypatch.setattr(tally, "KEPT", 5)
    code, out, found = run("found.json")
    assert code == DISAGREEMENT and found["outcomes"][MISMATCH] == found["cases"] == DRAWN
    first = [case.index for case, _ in zip(drawn(3, range(9)), range(5), strict=False)]
    assert [each["case"] for each in found["mismatches"]] == first
    assert f"... and {DRAWN - 5} more" in out
    first = found["mismatches"][0]["command"]
    assert first == "python scripts/cross_check.py --seed 3 --case 0 --oracle float64"
    assert command.main(first.split()[2:]) == DISAGREEMENT
    out = capsys.readouterr().out
    assert "\nours, value" in out and "\nin float64" in out and "eras" not in out


def test_an_error_in_the_comparison_is_a_mismatch_and_the_run_goes_on(run, monkeypatch):
    def judge(case, *_):
        if case.index == 7:
            raise IndexError("out of bounds")
        return compare_module.judge(case, *_)

    monkeypatch.setattr(campaign, "judge", judge)
    code, _, found = run("found.json")
    assert code == DISAGREEMENT and found["cases"] == DRAWN
    where = [(each["seed"], each["case"]) for each in found["mismatches"]]
    assert where == [(3, 7), (4, 7)] and "IndexError" in found["mismatches"][0]["reason"]


def test_what_is_kept_does_not_grow_with_the_cases(run, monkeypatch):
    monkeypatch.setattr(tally, "POINTS", 30)
    drawn, alive, draw = [], [], campaign.draw

    def watched(seed, index):
        case = draw(seed, index)
        drawn.append(weakref.ref(case))
        alive.append(sum(each() is not None for each in drawn))
        return case

    monkeypatch.setattr(campaign, "draw", watched)
    _, _, found = run("found.json")
    assert len(drawn) == 180 and max(alive) <= 5
    assert len(found["points"]) == 30
    assert found["points"] == sorted(found["points"], key=lambda point: point[:2])


@cache
def part(start, stop):
    with opened(Plan("recorded")) as oracles:
        block = Block(0, start, stop)
        found = tally_of(block, compare(Plan("recorded"), oracles, block), "")
    for index in range(start, stop):
        kind = ("", "value", "dtype")[index % 3]
        found.add_comparison(draw(0, index), kind, f"{kind} of {index}")
    return found


def through_json(found):
    return Tally.from_json(json.loads(json.dumps(found.to_json())))


@settings(deadline=None)  # the first example draws the parts
@given(st.permutations(range(8)), st.integers(0, 8), st.integers(1, 50))
def test_parts_are_added_up_in_any_order(order, split, points):
    parts = [part(start, start + 15) for start in range(0, 120, 15)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "POINTS", points)
        whole, one, other = Tally(), Tally(), Tally()
        for index in range(8):
            whole.merge(parts[index])
        for index in order[:split]:
            one.merge(parts[index])
        for index in order[split:]:
            other.merge(through_json(parts[index]))
        one = through_json(one)
        one.merge(other)
        assert one.to_json() == whole.to_json()
        assert whole.finished == {0: [(0, 120)]} and whole.cases == 120
        assert (
            whole.kinds["value"].first == (0, 1, "value of 1") and whole.kinds["dtype"].cases == 40
        )
        assert whole.nearer.total() > 10 and whole.outcomes[AGREES] > 60


NUMBERS = st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda at: (at[0], sum(at)))


@given(st.lists(NUMBERS), st.integers(0, 30))
def test_ranges_and_their_gaps_have_every_number_once(ranges, stop):
    def numbers(ranges):
        return [number for start, end in ranges for number in range(start, end)]

    found = joined(ranges)
    assert numbers(found) == sorted(set(numbers(ranges)))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
    missing = numbers(gaps(found, stop))
    assert missing == sorted(set(range(stop)) - set(numbers(ranges)))


ECHO = """
import pickle, sys
def send(message):
    pickle.dump(message, sys.stdout.buffer)
    sys.stdout.flush()
send({"versions": {}})
while True:
    try:
        cases = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    send([{"message": str(case["upstream"][0])} for case in cases])
"""


def test_answers_are_in_order_also_after_a_caller_who_wanted_no_more(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(ECHO)
    y, p = np.array([0]), np.ones((1, 2), np.float32)
    cases = [make_case(y, p, upstream=np.array([float(n)])) for n in range(57)]
    with LiveOracle("tf.keras", worker) as oracle:
        for wanted in (3, 10, 11, 57):
            found = [answer.message for answer, _ in zip(oracle.answers(cases), range(wanted))]  # noqa: B905
            assert found == [str(float(n)) for n in range(wanted)]


def test_a_live_oracle_in_each_process_gives_what_is_recorded(run, tensorflow):
    without_head = ("--filter", "loss: SparseCategoricalCrossentropy")
    arguments = ("--seed", "0", "--seeds", "1", "--cases", "60", *without_head)
    code, out, alive = run("1.json", *arguments, "--oracle", "tf.keras", "--workers", "2")
    assert code == AGREEMENT and "agree with tf.keras" in out
    code, _, recorded = run("2.json", *arguments, "--oracle", "recorded")
    assert code == AGREEMENT
    for key in ("cases", "finished", "outcomes", "reasons"):  # errors vary with the CPU
        assert alive[key] == recorded[key]


def test_the_file_is_written_while_it_runs(run, monkeypatch):
    saved, save = [], command.save

    def counting(results, path):
        save(results, path)
        saved.append(compared(json.loads(path.read_text())))

    monkeypatch.setattr(command, "save", counting)
    monkeypatch.setattr(command, "SAVE_EVERY", 0)
    run("found.json")
    assert saved == [20, 40, 60, 80, 90, 110, 130, 150, 170, 180, 180]


def test_a_plan_without_an_oracle_has_no_versions_but_ours():
    assert set(Oracles(None, None).versions["ours"]) == {"torch-sce", "torch", "numpy"}


def test_predictions_that_get_their_class_axis_from_the_targets_are_counted():
    y_pred, y_true = np.array([0.5, 0.2], np.float32), np.array([[1.0], [0.5]], np.float32)
    case = make_case(y_true, y_pred, name="CategoricalCrossentropy", axis=1, reduction="sum")
    tally = Tally()
    tally.add(judge(case, None, ours(case)))
    assert tally.outcomes[AGREES] == 1 and tally.points[0].classes == 1
