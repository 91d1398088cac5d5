"""`cross_check.py batch`: a batch of the user's, and the rule that accounts for a difference."""

import json
import re
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from torch_sce.crosscheck import batch, blocks, command, page, rules
from torch_sce.crosscheck.answers import OracleError, ours
from torch_sce.crosscheck.blocks import expected_in_blocks, judge_in_blocks, refusal
from torch_sce.crosscheck.cases import LOSSES
from torch_sce.crosscheck.compare import judge, reference
from torch_sce.crosscheck.draw import draw
from torch_sce.crosscheck.rules import steps

rng = np.random.default_rng(0)
Z = rng.standard_normal((6, 8, 5)).astype(np.float32)  # (B, T, C)
P = np.exp(Z) / np.exp(Z).sum(-1, keepdims=True)
Y = rng.integers(0, 5, (6, 8))
SQUARE = rng.standard_normal((6, 7, 7)).astype(np.float32)
IGNORED, MASK = np.where(rng.random((6, 8)) < 0.3, -1, Y), rng.random((6, 8)) < 0.7
WEIGHT = rng.uniform(0.5, 2, (6, 1))
SEEN = Z.argmax(-1) != Y  # the mean of the others is larger, that with small weights smaller

# The arrays, the options, the rules that have to be named, and the one with the largest part.
DISCREPANCIES = {
    "nothing": ((Y, Z), ["--from-logits"], [], None),
    "probabilities": ((Y, P), [], ["probabilities"], "probabilities"),
    "T = C": ((Y[:, :7], SQUARE), ["--from-logits"], ["axis"], "axis"),
    "padding": (
        (IGNORED, Z), ["--from-logits", "--ignore-class", "-1"], ["ignored labels"], None),
    "an ignored class": (
        (Y, Z), ["--from-logits", "--ignore-class", "2"], ["ignored labels"], "ignored labels"),
    "a mask": (
        (Y, Z, None, MASK), ["--from-logits"], ["mask"], "mask"),
    "weights": ((Y, Z, WEIGHT), ["--from-logits"], ["sample_weight"], "sample_weight"),
    "divided by the weights": (
        (Y, Z, WEIGHT), ["--from-logits", "--reduction", "mean_with_sample_weight"],
        ["sample_weight", "denominator"], None),
    "a sum": ((Y, Z), ["--from-logits", "--reduction", "sum"], ["denominator"], "denominator"),
    "half precision": ((Y, Z.astype(np.float16)), ["--from-logits"], ["precision"], "precision"),
    "channels first": ((Y, Z.swapaxes(1, 2)), ["--from-logits", "--axis", "1"], [], None),
    "nothing left": (
        (Y * 0, Z), ["--from-logits", "--ignore-class", "0"], ["ignored labels"], "ignored labels"),
    "PyTorch's own default": (
        (np.where(IGNORED < 0, -100, Y), Z), ["--from-logits", "--ignore-class", "-100"], [], None),
    "a mask for each sequence": (
        (Y, Z, None, np.arange(6)[:, None] < 4), ["--from-logits"], ["mask"], "mask"),
    "labels that wrap": (
        (np.where(IGNORED < 0, 255, Y).astype(np.uint8), np.tile(Z, 60)[..., :256]),
        ["--from-logits", "--ignore-class", "-1"], [], None),
    "labels (B, T, 1) of 32 bits": (
        (Y[..., None].astype(np.int32), Z), ["--from-logits"], [], None),
    "a sum of many signs": (
        (Y, Z, 0.1 * WEIGHT, SEEN), ["--from-logits"], ["mask", "sample_weight"], "sample_weight"),
    "all at once": (
        (IGNORED, P, WEIGHT, MASK), ["--ignore-class", "-1"],
        ["ignored labels", "probabilities", "mask", "sample_weight"], None),
}  # fmt: skip


@pytest.fixture
def run(tmp_path, capsys, keras, monkeypatch):
    """`run(arrays, *arguments)`: the exit code and what was printed, with the live tf.keras."""

    class Running:
        def __init__(self, name):
            pass

        def __enter__(self):
            return keras

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(batch, "LiveOracle", Running)

    def call(arrays, *arguments):
        names = ("y_true", "y_pred", "sample_weight", "mask")
        named = arrays if isinstance(arrays, dict) else dict(zip(names, arrays, strict=False))
        path = tmp_path / "batch.npz"
        np.savez(path, **{k: v for k, v in named.items() if v is not None})
        code = command.main(["batch", str(path), *arguments])
        return code, capsys.readouterr().out

    return call


def rules_in(out):
    table = out.partition("one rule at a time")[2]
    return re.findall(r"^│ (axis|ignored labels|precision|probabilities|mask|sample_weight|"
                      r"denominator) ", table, re.MULTILINE)  # fmt: skip


@pytest.mark.parametrize("name", DISCREPANCIES)
def test_the_rule_that_accounts_for_a_discrepancy_is_named(name, run):
    arrays, arguments, rules, largest = DISCREPANCIES[name]
    code, out = run(arrays, *arguments)
    swapped = name == "channels first"
    assert code == 0 and ("Differs on purpose: class axis" if swapped else "Agrees in value") in out
    assert rules_in(out) == rules
    if largest:
        assert f"comes from the rule {largest}: " in out
        assert ("100% of all changes" in out) == (len(rules) == 1)
    same = not rules or name in ("half precision", "nothing left", "padding", "all at once")
    assert same or float(re.split(r" *│ *", out.partition("│ F.cross_entropy")[2])[4]) > 0.01
    if not rules and not swapped:
        assert "No rule makes F.cross_entropy, as usually written, differ here." in out
    elif not swapped:
        left = re.search(r"Left after all rules: (\S+), which is rounding\.\n", out)
        assert left and abs(float(left[1])) < 1e-6 * (300 if name == "a sum" else 10)
    assert ("softmax, it used the logits under the softmax" in out) == (
        "--from-logits" not in arguments
    )


def drawn(count):
    for index in range(count):
        case = draw(21, index)
        reduced = case.options.get("reduction") not in ("none", None)
        plain = case.name == LOSSES[0] and case.form == "class" and not case.as_lists and reduced
        if plain and case.loss_dtype in ("float32", "float64") and reference(case)[0] is not None:
            yield case


def test_with_all_rules_f_cross_entropy_is_our_loss():
    compared = 0
    for case in drawn(2500):
        mine, right = ours(case), reference(case)[0]
        finite = np.isfinite(case.y_pred).all() and case.y_pred.size
        if not finite or case.y_pred_dtype not in ("float32", "float64") or mine.value is None:
            continue
        factor = float(np.ravel(case.upstream)[0])
        assert mine.gradient is not None
        last = steps(case, mine.gradient / factor)[-1]
        if last.value is None:
            assert last.rule == "as usually written" and not case.y_true.size
            continue
        assert right is not None and last.distance is not None
        # F.cross_entropy adds up other numbers in another order: 16 times their rounding.
        unit = 2.0**-24 if case.loss_dtype == "float32" else 2.0**-53
        size = abs(float(mine.value)) + float(right.value_scale)
        assert last.value == pytest.approx(
            float(mine.value), rel=0, abs=16 * unit * size + 1e-30, nan_ok=True
        ), case
        # Its gradient is p_y - 1 at the label, which loses digits where the loss is near 0.
        tiny = abs(float(mine.value)) < 1e4 * unit
        assert last.distance < 1e-4 or tiny or np.isnan(mine.gradient).any()
        compared += 1
    assert compared > 200


def cases_of_batch(count):
    """Cases that a file could hold: integer labels and a reduced loss; also those that raise."""
    for index in range(count):
        case = draw(22, index)
        reduced = case.options.get("reduction") not in ("none", None, "average")
        if case.name == LOSSES[0] and case.form == "class" and not case.as_lists and reduced:
            yield case


def test_the_rules_say_the_same_of_blocks_of_rows_as_of_the_whole(monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 20)
    compared = refused = 0
    for case in cases_of_batch(700):
        right, rule = reference(case)
        if rule == "reduction":
            continue
        assert refusal(case) == rule
        refused += right is None
        if right is None or not case.y_true.size:
            continue
        *parts, (none, value) = expected_in_blocks(case)
        assert none is None and value.gradient is None
        for name in ("value", "value_scale", "value_size"):
            np.testing.assert_array_equal(getattr(value, name), getattr(right, name))
        for rows, part in parts:
            assert rows is not None
            for name in ("gradient", "gradient_scale", "gradient_size"):
                whole = rows.of(getattr(right, name))
                np.testing.assert_array_equal(getattr(part, name), whole)
        compared += len(parts) > 1
    assert compared > 50 and refused > 10


def test_a_case_is_judged_the_same_in_blocks(monkeypatch):
    """Our own answer in tf.keras's place, as it is and with one thing wrong in it."""
    seen = Counter()
    for case in cases_of_batch(350):
        mine = ours(case)
        others = [mine]
        if mine.value is not None and mine.gradient is not None and mine.gradient.size:
            there = np.arange(mine.gradient.size) == mine.gradient.size // 2
            wrong = np.where(there.reshape(mine.gradient.shape), 1e30, mine.gradient)
            others += [replace(mine, value=mine.value + 1e9), replace(mine, gradient=wrong)]
        for keras, our in [(each, mine) for each in others] + [(mine, each) for each in others]:
            whole = judge(case, keras, our)
            monkeypatch.setattr(blocks, "ELEMENTS", 20)
            found = judge_in_blocks(case, keras, our)
            monkeypatch.undo()
            assert found.outcome == whole.outcome, f"{found}, as a whole: {whole}"
            seen[found.outcome] += 1
    assert seen["agrees"] > 100 and seen["mismatch"] > 100


def test_the_rules_of_the_ladder_say_the_same_in_blocks(monkeypatch):
    names = ("y_true", "y_pred", "sample_weight", "mask")
    for arrays, arguments, _, _ in DISCREPANCIES.values():
        named = {k: v for k, v in zip(names, arrays, strict=False) if v is not None}
        case = batch._case(batch.parser().parse_args(["file", *arguments]), named)
        whole = steps(case, ours(case).gradient)
        with monkeypatch.context() as patched:
            patched.setattr(rules, "ELEMENTS", 20)
            patched.setattr(blocks, "ELEMENTS", 20)
            parts = steps(case, ours(case).gradient)
        for a, b in zip(whole, parts, strict=True):
            # Squares are added up in another order.
            assert (a.rule, a.error, a.value) == (b.rule, b.error, b.value)
            for one, other in ((a.length, b.length), (a.distance, b.distance)):
                assert one is other is None or one == pytest.approx(other, rel=1e-12)


def test_one_row_of_very_many_classes_needs_no_matrix_of_them():
    z = np.zeros((2, 200_000), np.float32)
    case = batch._case(
        batch.parser().parse_args(["file", "--from-logits"]),
        {"y_true": np.array([5, 199_999]), "y_pred": z},
    )
    mine = ours(case)
    tracemalloc.start()
    assert judge_in_blocks(case, mine, mine).outcome == "agrees"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A row in float64 is 1.6 MB, a matrix of the classes 320 GB.
    assert peak < 100e6


@pytest.mark.parametrize(("text", "value"), [
    ("-1", -1), ("255.0", 255), ("1.5", 1.5), ("9007199254740993", 2**53 + 1), ("1e30", 1e30),
    ("18446744073709551616", 2.0**64), ("-inf", -np.inf),
])  # fmt: skip
def test_a_label_to_ignore_is_an_integer_where_int64_has_it(text, value):
    found = batch._number(text)
    assert found == value and type(found) is type(value)


def test_a_label_to_ignore_may_be_larger_than_any_integer(run):
    code, out = run((Y, Z), "--from-logits", "--ignore-class", "1e30")
    assert code == 0 and "Agrees in value and gradient." in out


def test_a_report_without_matplotlib_is_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    html = str(tmp_path / "report.html")
    for arguments in (["batch", "file.npz", "--html", html], ["--html", html]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
        assert "matplotlib, which is missing: pip install matplotlib" in capsys.readouterr().err


def test_both_raise_for_a_bad_label_and_the_finding_says_what_to_do(run):
    code, out = run((IGNORED, Z), "--from-logits")
    assert code == 0 and "Agrees: both raise." in out
    assert "IndexError: Target -1 is out of bounds" in out
    assert "Looks wrong: labels that look like an ignore value" in out
    assert "pass ignore_class=-1" in out


def test_a_deliberate_difference_is_named(run):
    code, out = run((Y[:, :6], Z[:, :6], np.ones(6)), "--from-logits")
    assert code == 0 and "Differs on purpose: `sample_weight` or mask `(B,)`" in out
    assert "pass sample_weight[:, None]" in " ".join(re.sub("[│\n]", " ", out).split())


def test_a_mismatch_is_exit_code_1(run, monkeypatch):
    def wrong(case):
        right = ours(case)
        assert right.value is not None
        return replace(right, value=right.value + 0.1)

    monkeypatch.setattr(batch, "ours", wrong)
    code, out = run((Y, Z), "--from-logits")
    assert code == 1 and "Mismatch of" in out


def test_what_looks_wrong_comes_before_an_outcome_that_is_not_green(run, tmp_path):
    report = tmp_path / "report.html"
    code, out = run((Y, 5 * Z), "--html", str(report))
    assert code == 0 and out.index("Looks wrong: logits passed as") < out.index("Agrees in value")
    assert out.index("Agrees in value") < out.index("Three results")
    text = report.read_text()
    kinds = re.findall(r'<p class="verdict (\w+)">(\w+)', text)
    assert kinds == [("bad", "Looks"), ("plain", "torch_sce")]
    run((Y, Z), "--from-logits", "--html", str(report))
    assert re.findall(r'<p class="verdict (\w+)">(\w+)', report.read_text()) == [
        ("good", "torch_sce")
    ]


def test_backticks_are_code_in_the_report(run, tmp_path):
    report = tmp_path / "report.html"
    run((Y[:, :6], Z[:, :6], np.ones(6)), "--from-logits", "--html", str(report), "--got", "1")
    body = report.read_text().partition("<h1>")[2].partition("<h2>What the loss did")[0]
    assert "`" not in body and "<code>sample_weight</code> or mask <code>(B,)</code>" in body


def test_where_tf_keras_raises_the_ladder_ends_there(run):
    code, out = run((IGNORED, Z), "--from-logits")
    assert code == 0 and rules_in(out) == []
    assert re.search(r"│ as usually written │ raises .*\n(│  .*\n)*│ tf\.keras  +│ raises ", out)
    assert "The ladder ends at tf.keras, which raises: F.cross_entropy raises." in out
    _, out = run((Y, Z.swapaxes(1, 2)), "--from-logits", "--axis", "1")
    assert "which raises: F.cross_entropy gives " in out and "\ntorch_sce gives " in out


def test_two_large_opposite_changes_are_not_sold_as_the_largest_part(run):
    _, out = run((Y, Z, np.full((6, 8), 40.0)), "--from-logits", "--reduction",
                 "mean_with_sample_weight")  # fmt: skip
    assert "The rules sample_weight (+" in out and ") and denominator (-" in out
    assert "work against each other" in out and "The largest part" not in out


def test_a_number_that_says_little_is_said_to(run):
    rows, labels = torch.tensor(Z).flatten(0, -2), torch.tensor(Y).flatten()
    loss = f"{torch.nn.functional.cross_entropy(rows, labels).item():.1g}"
    _, out = run((Y, Z), "--from-logits", "--got", loss)
    assert "So would many other values: pass more digits to be sure." in " ".join(out.split())
    _, out = run((Y, Z), "--from-logits", "--got", "nan")
    assert "Look for a division by 0" in out and "nearest" not in out


def test_json_has_what_is_shown(run, tmp_path):
    path = tmp_path / "found.json"
    weighted = (Y, Z, WEIGHT), ["--from-logits", "--got", "3.2"]
    for arrays, arguments in ((Y, 5 * Z), []), ((IGNORED, Z), ["--from-logits"]), weighted:
        _, out = run(arrays, *arguments, "--json", str(path))
        found = json.loads(path.read_text())
        assert found["outcome"] == "agrees" and set(found["results"]) == {"tf.keras", "torch_sce"}
        assert all(sentence in out for sentence in found["said"])
        assert [each["name"] for each in found["findings"] if each["is_wrong"]] == re.findall(
            r"Looks wrong: ([^:]*):", out
        )
    assert found["got"] == "3.2" and [step["rule"] for step in found["ladder"]] == [
        "as usually written", "sample_weight"
    ]  # fmt: skip


def test_the_report_is_one_file_with_tables_and_pictures(run, tmp_path):
    report = tmp_path / "report.html"
    code, out = run((IGNORED, P, WEIGHT, MASK), "--ignore-class", "-1", "--html", str(report))
    text = report.read_text()
    assert code == 0 and f"Report: {report}" in out.replace("\n", "")
    assert text.count("data:image/png;base64,") == 2 and "http" not in text
    for part in ("probabilities", "not counted", "p(label)", "Agrees in value and gradient"):
        assert part in text
    run((IGNORED, Z), "--from-logits", "--html", str(report))
    assert "Agrees: both raise" in report.read_text()


@pytest.mark.parametrize(("arrays", "arguments", "message"), [
    ({"labels": Y, "y_pred": Z}, [], "the array y_true is missing; it has labels, y_pred"),
    ({"y_true": Y}, [], r"the array y_pred is missing; it has y_true\. Write the file with"),
    ({"y_true": Y, "y_pred": Z, "weights": WEIGHT}, [], "weights is not one of the arrays y_true"),
    ({"y_true": Y[:5], "y_pred": Z}, [], r"y_true must have the shape of y_pred .* got \(5, 8\)"),
    ({"y_true": Y, "y_pred": Y}, [], "of at most 64 bits, got int64; are y_true and y_pred swap"),
    ({"y_true": Y.astype(object), "y_pred": Z}, [], "arrays of numbers, got Python objects"),
    ({"y_true": Y.astype(str), "y_pred": Z}, [], "y_true must hold numbers .*, got <U"),
    ({"y_true": Y[:0], "y_pred": Z[:0]}, [], r"shape \(0, 8, 5\): no positions"),
    ({"y_true": Y, "y_pred": Z.astype(np.longdouble)}, [], "of at most 64 bits, got float128"),
    ({"y_true": Y, "y_pred": Z}, ["--html", "/"], "/: is a folder; name a file"),
    ({"y_true": Y, "y_pred": Z}, ["--axis", "3"], "axis must be in"),
    ({"y_true": Y, "y_pred": Z, "mask": MASK[:3]}, [], "mask must broadcast to the losses' shape"),
    ({"y_true": Y, "y_pred": Z}, ["--reduction", "none"], "invalid choice"),
    ({"y_true": Y, "y_pred": Z}, ["--dtype", "int8"], "argument --dtype: dtype must be"),
    ({"y_true": Y, "y_pred": Z}, ["--got", "3,02"], "argument --got: must be a number, got '3,02'"),
    ({"y_true": Y, "y_pred": Z}, ["--ignore-class", "x"], "must be a number, got 'x'"),
    ({"y_true": Y, "y_pred": Z}, ["--html", "/no/such/folder/x.html"], "there is no folder"),
])  # fmt: skip
def test_wrong_usage_is_exit_code_2(arrays, arguments, message, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arrays, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error), error


def other_content(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("y_true.npy", "y_pred.npy"):
            archive.writestr(name, "text")


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "there is no such file"),
    (lambda path: path.mkdir(), "is a folder; name a file"),
    (lambda path: path.write_bytes(b"no archive"), "must be a file that np.savez wrote"),
    (lambda path: path.touch(), "must be a file that np.savez wrote"),
    (other_content, "y_true must be an array that np.savez wrote"),
])  # fmt: skip
def test_a_file_that_is_none_is_exit_code_2(write, message, tmp_path, capsys):
    path = tmp_path / "batch.npz"
    write(path)
    with pytest.raises(SystemExit) as stopped:
        command.main(["batch", str(path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_usual_line_is_the_one_that_runs(run):
    _, out = run((Y[..., None].astype(np.int32), Z), "--from-logits")
    line = "F.cross_entropy(y_pred.reshape(-1, 5), y_true.reshape(-1).long())"
    assert line in " ".join(re.sub("[│\n]", " ", out).split())
    code, out = run((Y.astype(">i4"), Z.astype(">f4")), "--from-logits")
    assert code == 0 and "Agrees in value" in out


def test_more_than_rounding_is_not_called_so(run):
    _, out = run((Y, Z), "--from-logits", "--dtype", "float16")
    left = re.search(r"Left after all rules: (\S+)\.\n", out)
    assert left and 1e-5 < abs(float(left[1])) < 1e-2


def test_the_parts_that_are_left_out_are_counted(run):
    _, out = run((Y, Z, None, np.arange(6)[:, None] < 4), "--from-logits")
    assert "16 of 48 positions have mask 0" in out
    line = "F.cross_entropy(y_pred.reshape(-1, 5), y_true.reshape(-1)) "
    assert line in " ".join(re.sub("[│\n]", " ", out).split())


def test_what_only_pytorch_skips_is_shown(run):
    _, out = run((np.where(IGNORED < 0, -100, Y), Z), "--from-logits")
    assert "Agrees: both raise." in out and re.search(r"F\.cross_entropy +│ +[\d.]+", out)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "batch.npz"
    np.savez_compressed(path, y_true=Y, y_pred=np.zeros_like(Z))
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = b"\xff" * (
        len(content) // 2 - len(content) // 3
    )
    path.write_bytes(content)
    with pytest.raises(batch.Unreadable, match=r"must be a file that np\.savez wrote"):
        batch.read(path)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", Y)
    with pytest.raises(batch.Unreadable, match=r"written by np\.savez, not by np\.save"):
        batch.read(tmp_path / "one.npy")


def test_without_tf_keras_it_is_exit_code_3(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise OracleError("the oracle tf.keras is not installed")

    monkeypatch.setattr(batch, "LiveOracle", missing)
    np.savez(tmp_path / "batch.npz", y_true=Y, y_pred=Z)
    assert command.main(["batch", str(tmp_path / "batch.npz")]) == 3
    assert "tf.keras is not installed" in capsys.readouterr().out
