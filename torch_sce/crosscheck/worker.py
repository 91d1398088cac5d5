"""A process that answers cases with one Keras; run as a file, not imported.

`python worker.py NAME` reads pickled cases from standard input and writes pickled answers to
standard output. It imports Keras and NumPy and nothing of this package: environment
variables select the Keras when it is imported, so each one needs its own process.
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


PARTS = ("value", "gradient", "target_gradient", "weight_gradient", "bias_gradient")


def load(name: str):
    """(Keras, functions of that backend, versions)."""
    os.environ.update(ENVIRONMENT[name])
    # The comparison is for the CPU; and one thread is fastest for small tensors.
    os.environ.update(
        {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_NUM_INTRAOP_THREADS": "1"}
    )
    if name in ("tf.keras", "tf_keras"):
        import tensorflow as tf

        keras = tf.keras
        packages = ("tensorflow", "keras" if name == "tf.keras" else "tf_keras")
        backend = WithTensorflow if name == "tf.keras" else WithKeras2
    else:
        import keras

        packages = ("keras", name.removeprefix("keras-"))
        backend = {"torch": WithTorch, "jax": WithJax}[packages[1]]
    return keras, backend, {package: version(package) for package in (*packages, "numpy")}


class Raised(Exception):
    """What Keras raised: its answer, unlike an error in this file."""


@contextmanager
def keras_speaks() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise Raised from error


def answer(keras, backend, case: dict) -> dict:
    """Keras's answer to the case: value and gradients, or the error it raises."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            parts = differentiate(keras, backend, case) if case["is_loss"] else (
                measure(keras, backend, case),)  # fmt: skip
    except Raised as raised:
        error = raised.__cause__
        text = str(error).split("}} ")[-1].splitlines()  # TensorFlow puts the operation first
        return {"error": type(error).__name__, "message": text[0][:300] if text else ""}
    result = {}
    for part, tensor in zip(PARTS, parts, strict=False):
        result[part], result[f"{part}_dtype"] = (None, None) if tensor is None else plain(tensor)
    return result


def differentiate(keras, backend, case: dict):
    """A loss's value, and its gradients with respect to the predictions and to the targets; with
    a head those with respect to its inputs, to nothing, and to its weight and bias.
    """
    (batch,) = case["steps"]
    # Keras 2's class has no such arguments; at their defaults they need not be named.
    defaults = {"axis": -1, "dtype": None} if case["is_sparse"] else {"dtype": None}
    options = {k: v for k, v in case["options"].items() if k not in defaults or v != defaults[k]}

    def value(y_true, y_pred):
        if case["as_lists"]:  # they have no gradient to ask for
            y_true, y_pred = batch["y_true"].tolist(), batch["y_pred"].tolist()
        elif batch["mask"] is not None:
            backend.attach(y_pred, batch["mask"])
        with keras_speaks():
            if case["form"] == "function":
                return getattr(keras.losses, case["function"])(y_true, y_pred, **options)
            loss = getattr(keras.losses, case["name"])(**options)
            return loss(y_true, y_pred, sample_weight=batch["sample_weight"])

    y_true = batch["y_true"]
    x = backend.tensor(batch["y_pred"], batch["y_pred_dtype"])
    if case["head"] is not None:
        return backend.through_dense(keras, value, y_true, x, case["upstream"], **case["head"])
    soft = not case["is_sparse"] and np.issubdtype(y_true.dtype, np.floating)
    t = backend.tensor(y_true, y_true.dtype.name) if soft else backend.labels(y_true)
    return backend.differentiate(value, t, x, case["upstream"], soft)


def measure(keras, backend, case: dict):
    """An accuracy for every position, or a metric's results after every update."""
    if case["form"] == "function":
        (batch,) = case["steps"]
        y_pred = backend.tensor(batch["y_pred"], batch["y_pred_dtype"])
        with keras_speaks():
            function = getattr(keras.metrics, case["function"])
            return function(batch["y_true"], y_pred, **case["options"])
    with keras_speaks():
        metric = getattr(keras.metrics, case["name"])(**case["options"])
    results = []
    for batch in case["steps"]:
        if batch is None:
            metric.reset_state()
        else:
            y_true = batch["y_true"]
            y_pred = backend.tensor(batch["y_pred"], batch["y_pred_dtype"])
            if case["as_lists"]:
                y_true, y_pred = y_true.tolist(), batch["y_pred"].tolist()
            elif batch["mask"] is not None:
                backend.attach(y_pred, batch["mask"])
            with keras_speaks():
                backend.update(metric, y_true, y_pred, batch["sample_weight"])
        with keras_speaks():
            results.append(metric.result())
    return backend.stack(results)


class WithTensorflow:
    """The few calls that differ between backends."""

    @staticmethod
    def tensor(array, dtype):
        import tensorflow as tf

        return tf.cast(tf.constant(array), dtype)

    @staticmethod
    def labels(array):
        return array

    @staticmethod
    def attach(y_pred, mask):
        import tensorflow as tf

        y_pred._keras_mask = tf.constant(mask)

    @staticmethod
    def update(metric, y_true, y_pred, sample_weight):
        metric.update_state(y_true, y_pred, sample_weight)

    @staticmethod
    def stack(results):
        import tensorflow as tf

        return tf.stack(results)

    @staticmethod
    def differentiate(value, t, x, upstream, soft):
        import tensorflow as tf

        wanted = [x, t] if soft else [x]
        with tf.GradientTape() as tape:
            tape.watch(wanted)
            result = value(tf.identity(t) if soft else t, tf.identity(x))
            total = tf.reduce_sum(result * tf.cast(np.resize(upstream, result.shape), result.dtype))
        with keras_speaks():
            gradients = tape.gradient(total, wanted)
        return result, gradients[0], gradients[1] if soft else None

    @staticmethod
    def through_dense(keras, value, y_true, x, upstream, weight, bias, softcap, **_):
        """As a model is trained: `Dense` and the loss under a `GradientTape`."""
        import tensorflow as tf

        with keras_speaks():
            dense = keras.layers.Dense(len(weight), use_bias=bias is not None, dtype=x.dtype.name)
            dense.build((None, x.shape[-1]))
        dense.kernel.assign(tf.cast(tf.constant(weight.T), x.dtype))
        if bias is not None:
            dense.bias.assign(tf.cast(tf.constant(bias), x.dtype))
        with tf.GradientTape() as tape:
            tape.watch(x)
            with keras_speaks():
                z = dense(x) if x.ndim > 1 else dense(x[None])[0]
            if softcap is not None:
                z = tf.cast(z, tf.float32) if x.dtype.size == 2 else z
                z = softcap * tf.tanh(z / softcap)
            result = value(y_true, tf.identity(z))
            total = tf.reduce_sum(result * tf.cast(np.resize(upstream, result.shape), result.dtype))
        with keras_speaks():
            dx, dkernel, *dbias = tape.gradient(total, [x, *dense.trainable_variables])
        return result, dx, None, tf.transpose(tf.convert_to_tensor(dkernel)), *dbias


class WithKeras2(WithTensorflow):
    """As `fit` calls it: labels are tensors, and a mask is a factor of a metric's weights."""

    @staticmethod
    def labels(array):
        import tensorflow as tf

        return tf.constant(array)

    @staticmethod
    def update(metric, y_true, y_pred, sample_weight):
        from tf_keras.src.utils.losses_utils import apply_mask, get_mask

        weight = apply_mask(y_pred, sample_weight, get_mask(y_pred))
        metric.update_state(y_true, y_pred, weight)


class WithTorch:
    @staticmethod
    def update(metric, y_true, y_pred, sample_weight):
        metric.update_state(y_true, y_pred, sample_weight)

    @staticmethod
    def tensor(array, dtype):
        import torch

        return torch.tensor(array).to(getattr(torch, dtype))

    @staticmethod
    def labels(array):
        import torch

        return torch.tensor(array)

    @staticmethod
    def attach(y_pred, mask):
        import torch

        y_pred._keras_mask = torch.tensor(mask)

    @staticmethod
    def stack(results):
        import torch

        return torch.stack(results)

    @staticmethod
    def differentiate(value, t, x, upstream, soft):
        import torch

        if x.is_floating_point():
            x.requires_grad_()
        if soft:
            t.requires_grad_()
        result = value(t * 1 if soft else t, x * 1)
        upstream = torch.tensor(np.resize(upstream, tuple(result.shape)))
        if result.requires_grad:
            with keras_speaks():
                (result * upstream.to(result.dtype)).sum().backward()
        return result.detach(), x.grad, t.grad


class WithJax:
    @staticmethod
    def update(metric, y_true, y_pred, sample_weight):
        metric.update_state(y_true, y_pred, sample_weight)

    @staticmethod
    def tensor(array, dtype):
        import jax.numpy as jnp

        return jnp.asarray(array).astype(dtype)

    @staticmethod
    def labels(array):
        import jax.numpy as jnp

        return jnp.asarray(array)

    @staticmethod
    def attach(y_pred, mask):
        import jax.numpy as jnp
        from keras.src import backend

        backend.set_keras_mask(y_pred, jnp.asarray(mask))

    @staticmethod
    def stack(results):
        import jax.numpy as jnp

        return jnp.stack(results)

    @staticmethod
    def differentiate(value, t, x, upstream, soft):
        import jax
        import jax.numpy as jnp

        def total(x, t):
            result = value(t * 1 if soft else t, x * 1)
            weights = np.resize(upstream, result.shape).astype(result.dtype)
            return (result * weights).sum(), result

        if not jnp.issubdtype(x.dtype, jnp.floating):
            return total(x, t)[1], None, None
        wanted = (0, 1) if soft else (0,)
        # Compiles once, not for every operation.
        gradients, result = jax.jit(jax.grad(total, wanted, has_aux=True))(x, t)
        return result, gradients[0], gradients[1] if soft else None


def plain(tensor) -> tuple[np.ndarray, str]:
    """A tensor as a NumPy array that any process can read, and the name of its dtype."""
    dtype = getattr(tensor.dtype, "name", str(tensor.dtype).removeprefix("torch."))
    if dtype == "bfloat16" and hasattr(tensor, "float"):  # PyTorch's has no NumPy equivalent
        tensor = tensor.float()
    array = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    return (array.astype(np.float32) if dtype in ("float16", "bfloat16") else array), dtype


def main() -> None:
    # Libraries print to standard output, which is reserved for answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: dict | list) -> None:
        pickle.dump(message, channel)
        channel.flush()

    try:
        keras, backend, versions = load(sys.argv[1])
    except ImportError as error:
        return send({"missing": str(error)})
    send({"versions": versions})
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        send([answer(keras, backend, case) for case in batch])


if __name__ == "__main__":
    main()
