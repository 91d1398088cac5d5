"""A process that answers cases with one of the Kerases; run as a file, not imported.

`python worker.py NAME` reads pickled cases from standard input and writes pickled answers to
standard output. It imports Keras and NumPy and nothing of this package: which Keras an
interpreter has is fixed by environment variables when Keras is imported, so each gets its own.
"""

import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np

ENVIRONMENT = {
    "tf.keras": {"KERAS_BACKEND": "tensorflow", "TF_USE_LEGACY_KERAS": "0"},
    "tf_keras": {"TF_USE_LEGACY_KERAS": "1"},
    "keras-torch": {"KERAS_BACKEND": "torch"},
    "keras-jax": {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
}


def load(name: str):
    """(losses module, function from it and a case to a value and a gradient, versions)."""
    os.environ.update(ENVIRONMENT[name])
    # The evidence is about the CPU; and one thread is fastest for small tensors.
    os.environ.update(
        {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"}
    )
    if name in ("tf.keras", "tf_keras"):
        import tensorflow as tf

        losses = tf.keras.losses
        packages = ("tensorflow", "keras" if name == "tf.keras" else "tf_keras")
        differentiate = with_tensorflow
    else:
        import keras

        losses = keras.losses
        backend = name.removeprefix("keras-")
        packages = ("keras", backend)
        differentiate = {"torch": with_torch, "jax": with_jax}[backend]
    return losses, differentiate, {package: version(package) for package in (*packages, "numpy")}


class Raised(Exception):
    """What Keras raised: its answer, unlike an error in this file."""


@contextmanager
def keras_speaks() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Raised from error


def answer(losses, differentiate, case: dict) -> dict:
    """What that Keras makes of the case: value and gradient, or the error it raises."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            value, gradient = differentiate(losses, case)
    except Raised as raised:
        error = raised.__cause__
        text = str(error).split("}} ")[-1].splitlines()  # TensorFlow puts the operation first
        return {"error": type(error).__name__, "message": text[0][:300] if text else ""}
    result = {}
    for part, tensor in {"value": value, "gradient": gradient}.items():
        result[part], result[f"{part}_dtype"] = (None, None) if tensor is None else plain(tensor)
    return result


def evaluate(losses, case: dict, y_true, y_pred, mask):
    """The loss's value for these tensors, mask attached as Keras layers attach it."""
    # Keras 2's class has no such arguments; at their defaults they need not be named.
    defaults = {"axis": -1, "dtype": None}
    options = {k: v for k, v in case["options"].items() if k not in defaults or v != defaults[k]}
    if mask is not None and not case["as_lists"]:
        y_pred._keras_mask = mask
    with keras_speaks():
        if case["form"] == "function":
            return losses.sparse_categorical_crossentropy(y_true, y_pred, **options)
        loss = losses.SparseCategoricalCrossentropy(**options)
        return loss(y_true, y_pred, sample_weight=case["sample_weight"])


def with_tensorflow(losses, case: dict):
    import tensorflow as tf

    x = tf.cast(tf.constant(case["y_pred"]), case["y_pred_dtype"])
    y_true = case["y_true"]
    mask = None if case["mask"] is None else tf.constant(case["mask"])
    with tf.GradientTape() as tape:
        tape.watch(x)
        # Lists have no gradient to ask for.
        y_pred = case["y_pred"].tolist() if case["as_lists"] else tf.identity(x)
        y_true = y_true.tolist() if case["as_lists"] else y_true
        value = evaluate(losses, case, y_true, y_pred, mask)
        upstream = np.resize(case["upstream"], value.shape)
        total = tf.reduce_sum(value * tf.cast(upstream, value.dtype))
    with keras_speaks():
        return value, tape.gradient(total, x)


def with_torch(losses, case: dict):
    import torch

    dtype = getattr(torch, case["y_pred_dtype"])
    x = torch.tensor(case["y_pred"]).to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    y_pred = case["y_pred"].tolist() if case["as_lists"] else x * 1
    y_true = case["y_true"].tolist() if case["as_lists"] else torch.tensor(case["y_true"])
    mask = None if case["mask"] is None else torch.tensor(case["mask"])
    value = evaluate(losses, case, y_true, y_pred, mask)
    upstream = torch.tensor(np.resize(case["upstream"], tuple(value.shape)))
    if value.requires_grad:
        with keras_speaks():
            (value * upstream.to(value.dtype)).sum().backward()
    return value.detach(), x.grad


def with_jax(losses, case: dict):
    import jax
    import jax.numpy as jnp

    def total(x):
        y_pred = case["y_pred"].tolist() if case["as_lists"] else x * 1
        y_true = case["y_true"].tolist() if case["as_lists"] else jnp.asarray(case["y_true"])
        mask = None if case["mask"] is None else jnp.asarray(case["mask"])
        if mask is not None and not case["as_lists"]:
            from keras.src import backend

            backend.set_keras_mask(y_pred, mask)
            mask = None
        value = evaluate(losses, case, y_true, y_pred, mask)
        upstream = np.resize(case["upstream"], value.shape)
        return (value * upstream.astype(value.dtype)).sum(), value

    x = jnp.asarray(case["y_pred"]).astype(case["y_pred_dtype"])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return total(x)[1], None
    gradient, value = jax.jit(jax.grad(total, has_aux=True))(x)  # compiles once, not per operation
    return value, gradient


def plain(tensor) -> tuple[np.ndarray, str]:
    """A tensor as a NumPy array that any process can read, and the name of its dtype."""
    dtype = getattr(tensor.dtype, "name", str(tensor.dtype).removeprefix("torch."))
    if dtype == "bfloat16" and hasattr(tensor, "float"):  # PyTorch's has no NumPy equivalent
        tensor = tensor.float()
    array = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    return (array.astype(np.float32) if dtype in ("float16", "bfloat16") else array), dtype


def main() -> None:
    # Libraries print to standard output; the protocol needs it for itself.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: dict | list) -> None:
        pickle.dump(message, channel)
        channel.flush()

    try:
        losses, differentiate, versions = load(sys.argv[1])
    except ImportError as error:
        return send({"missing": str(error)})
    send({"versions": versions})
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        send([answer(losses, differentiate, case) for case in batch])


if __name__ == "__main__":
    main()
