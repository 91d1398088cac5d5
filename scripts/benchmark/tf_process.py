"""Measures tf.keras in a process of its own, as Keras has one backend in a process."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import TF_KERAS, Case, labels, predictions
from .measuring import BOTH, FORWARD, Effort, busy_cores, interleaved
from .peers import keras_loss
from .results import Result

PROGRAM = Path(__file__).parent
EFFORT: Effort = (4.0, 5)


def measure(results: Sequence[Result], options: argparse.Namespace) -> dict[str, str]:
    """Adds tf.keras to the results, from a process of its own; returns its versions."""
    asked = [result for result in results if result.case.for_keras]
    try:
        answer = ask_worker([result.case for result in asked], options)
    except RuntimeError as error:
        for result in asked:
            result.missing[TF_KERAS] = str(error)
        return {}
    for result, (seconds, loss) in zip(asked, answer["results"], strict=True):
        result.seconds[TF_KERAS], result.losses[TF_KERAS] = seconds, loss
    return answer["versions"]


def ask_worker(cases: Sequence[Case], options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        raise RuntimeError("left out by --quick")
    if options.device != "cpu":
        raise RuntimeError("measured with --device cpu only")
    question = {
        "cases": [(case.shape, case.kind, case.soft, case.busy) for case in cases],
        "threads": options.threads,
    }
    variables = {
        "KERAS_BACKEND": "tensorflow",
        "TF_USE_LEGACY_KERAS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--worker"],
        input=json.dumps(question),
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError((ended.stderr.splitlines() or ["crashed"])[-1][:120])
    return json.loads(ended.stdout.splitlines()[-1])


def work() -> None:
    """Measures the cases of standard input, for `ask_worker`."""
    asked = json.load(sys.stdin)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(asked["threads"])

    def timed(
        shape: list[int], kind: str, soft: bool, busy: bool
    ) -> tuple[dict[str, list[float]], float]:
        case = Case(tuple(shape), kind, soft=soft)
        y_true, y_pred = tf.constant(labels(case).numpy()), tf.constant(predictions(case).numpy())
        loss = keras_loss(tf.keras.losses, case)

        def forward() -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                tape.watch(y_pred)
                return loss(y_true, y_pred), tape

        def both() -> Any:
            value, tape = forward()
            return tape.gradient(value, y_pred)

        calls = {(TF_KERAS, FORWARD): forward, (TF_KERAS, BOTH): both}
        with busy_cores(busy):
            seconds = interleaved(calls, "cpu", EFFORT)[TF_KERAS]
        return seconds, float(forward()[0])

    results = [timed(*case) for case in asked["cases"]]
    versions = {"tensorflow": tf.__version__, "tf.keras": tf.keras.__version__}
    print(json.dumps({"results": results, "versions": versions}))
