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
# # Maps, padding and weights
#
# In segmentation maps and in sequences some positions do not count: the void border around objects,
# the padding after the end of a sentence. And some count more than others: rare classes. In each
# case the question is: **what is the sum divided by?**

# %%
import os

import torch._dynamo  # loads Triton, which may fail to load after TensorFlow

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from torch_sce import SparseCategoricalCrossentropy, explain

OURS, OTHER, GREY = "#1f6fb2", "#d1622b", "#c9d0d6"
plt.rcParams.update(
    {"figure.figsize": (8, 3), "figure.dpi": 100, "figure.constrained_layout.use": True}
)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## A segmentation batch with a void border
#
# Four drawn scenes: background (0), discs (1) and bars (2). As in PASCAL VOC, a border of two
# pixels around each object is void, label 255: its class is unknown.

# %%
VOID, SIZE = 255, 96


def scene(number):
    """The labels of one scene, (SIZE, SIZE)."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    distance = {1: np.full((SIZE, SIZE), np.inf), 2: np.full((SIZE, SIZE), np.inf)}
    for _ in range(2):
        y, x = rng.integers(20, SIZE - 20, 2)
        disc = np.hypot(rows - y, columns - x) - rng.integers(8, 16)
        distance[1] = np.minimum(distance[1], disc)
    y, x = rng.integers(15, SIZE - 15, 2)
    distance[2] = np.maximum(abs(rows - y) - 3, abs(columns - x) - rng.integers(14, 30))
    labels = np.zeros((SIZE, SIZE), np.int64)
    for kind, away in distance.items():
        labels[away < 2] = VOID
        labels[away < 0] = kind
    return labels


maps = torch.tensor(np.stack([scene(number) for number in range(4)]))  # (B, H, W)
print({int(k): f"{(maps == k).double().mean():.1%}" for k in maps.unique()})

# %% [markdown]
# Predictions as a half-trained model gives them: `(B, C, H, W)`, PyTorch's channels-first. In the
# void, where nothing was learnt, they are noise.

# %%
is_void = maps == VOID
evidence = F.one_hot(torch.where(is_void, 0, maps), 3).movedim(-1, 1).float()
predictions = 2.0 * F.avg_pool2d(evidence, 7, stride=1, padding=3)
noise = torch.randn(4, 3, SIZE, SIZE, generator=generator)
predictions = predictions + noise * torch.where(is_void, 3.0, 0.5)[:, None]

loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=VOID, axis=1)
per_pixel = SparseCategoricalCrossentropy(True, ignore_class=VOID, axis=1, reduction="none")
print("labels", tuple(maps.shape), "predictions", tuple(predictions.shape))
print("loss", loss(maps, predictions).item())

# %%
shown = torch.where(is_void, 3, maps)
colors = plt.matplotlib.colors.ListedColormap(["#f2f4f6", OURS, OTHER, "#1b1f24"])
figure, panels = plt.subplots(1, 3, figsize=(9, 3.2))
panels[0].imshow(shown[0], cmap=colors, vmin=0, vmax=3)
panels[0].set_title("labels (black: void)")
panels[1].imshow(predictions[0].argmax(0), cmap=colors, vmin=0, vmax=3)
panels[1].set_title("largest prediction")
picture = panels[2].imshow(per_pixel(maps, predictions)[0], cmap="magma")
panels[2].set_title("loss of each pixel")
figure.colorbar(picture, ax=panels[2], label="loss [nats]", shrink=0.85)
for panel in panels:
    panel.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The void is black in the last picture, too: exactly 0, and so is the gradient there, for any
# predictions. It is also left out of the denominator. Here is what the choices give:

# %%
everything = F.cross_entropy(predictions, torch.where(is_void, 0, maps), reduction="none")
choices = {
    "void treated as background": everything.mean(),
    "void adds 0, but is counted": everything[~is_void].sum() / maps.numel(),
    "void left out (ignore_class)": loss(maps, predictions),
}
for name, value in choices.items():
    print(f"{name:30s} {value.item():.6f}")
pytorch = F.cross_entropy(predictions, maps, ignore_index=VOID)
print(f"{'F.cross_entropy, ignore_index':30s} {pytorch.item():.6f}")
assert torch.isclose(loss(maps, predictions), pytorch)

leaf = predictions.clone().requires_grad_()
(gradient,) = torch.autograd.grad(loss(maps, leaf), leaf)
assert (gradient.movedim(1, -1)[is_void] == 0).all()

# %%
plt.figure(figsize=(8, 1.8))
names = list(choices)[::-1]
plt.barh(names, [choices[name].item() for name in names], color=[OURS, OTHER, GREY])
plt.xlabel("loss of the same predictions [nats]")
plt.title("What the void does to the number")
plt.show()

# %% [markdown]
# ## Rare classes
#
# Discs and bars are rare, so their pixels get more weight. Keras has no class weights in the loss;
# look them up by label and pass them as `sample_weight`. (The `clamp` is for 255, which is
# outside `[0, C)`; its pixels do not count.)
#
# Keras divides by the *number* of pixels, `F.cross_entropy(weight=...)` by the sum of their
# *weights*. Both are here: the default is Keras's, `"mean_with_sample_weight"` PyTorch's.

# %%
counts = torch.bincount(maps[~is_void], minlength=3)
class_weights = counts.sum() / (3 * counts)  # "balanced": their mean over the pixels is 1
pixel_weights = class_weights[maps.clamp(0, 2)]
print("class weights", [round(w, 3) for w in class_weights.tolist()])

as_keras = loss(maps, predictions, sample_weight=pixel_weights)
as_pytorch = SparseCategoricalCrossentropy(
    True, ignore_class=VOID, axis=1, reduction="mean_with_sample_weight"
)(maps, predictions, sample_weight=pixel_weights)
pytorch = F.cross_entropy(predictions, maps, weight=class_weights, ignore_index=VOID)
print("divided by the number of pixels", as_keras.item())
print("divided by their weights       ", as_pytorch.item(), " F.cross_entropy", pytorch.item())
assert torch.isclose(as_pytorch, pytorch)

# %% [markdown]
# Balanced over the whole batch, the two agree; in the crops that a training draws they do not. The
# same weights, one scene after the other:

# %%
rows = []
for one, prediction, weight in zip(maps, predictions, pixel_weights, strict=True):
    arguments = (one[None], prediction[None], weight[None])
    by_weight = SparseCategoricalCrossentropy(
        True, ignore_class=VOID, axis=1, reduction="mean_with_sample_weight"
    )
    rows.append((loss(*arguments).item(), by_weight(*arguments).item()))
rows = np.array(rows)
x = np.arange(4)
plt.bar(x - 0.2, rows[:, 0], 0.4, color=OURS, label="/ number of pixels (Keras)")
plt.bar(x + 0.2, rows[:, 1], 0.4, color=OTHER, label="/ sum of weights (PyTorch's weight=)")
plt.xticks(x, [f"scene {number}" for number in x])
plt.ylabel("loss [nats]")
plt.ylim(0, 1.4 * rows.max())
plt.title("The same weights, two denominators")
plt.legend(frameon=False, ncols=2)
plt.show()

# %% [markdown]
# ## A padded batch of sequences
#
# Six sentences of different lengths, padded with -1 to the longest. Predictions are `(B, T, V)`.

# %%
lengths = torch.tensor([12, 9, 7, 4, 3, 1])
B, T, V = len(lengths), int(lengths.max()), 40
tokens = torch.randint(0, V, (B, T), generator=generator)
counts_here = torch.arange(T) < lengths[:, None]
padded = torch.where(counts_here, tokens, -1)
scores = torch.randn(B, T, V, generator=generator)
scores = scores + 3 * F.one_hot(tokens, V) * (torch.arange(B) / B)[:, None, None]

each = SparseCategoricalCrossentropy(True, ignore_class=-1, reduction="none")(padded, scores)

figure, panel = plt.subplots(figsize=(8, 2.6))
picture = panel.imshow(torch.where(counts_here, each, torch.nan), cmap="viridis", aspect="auto")
for b, t in (~counts_here).nonzero().tolist():
    panel.text(t, b, "-1", ha="center", va="center", color="#8c959f", fontsize=8)
figure.colorbar(picture, label="loss [nats]")
panel.set(xlabel="position in the sentence", ylabel="sentence", title="The loss of each token")
plt.show()

# %% [markdown]
# What each choice divides by:

# %%
ignoring = SparseCategoricalCrossentropy(True, ignore_class=-1)
plain = SparseCategoricalCrossentropy(True)
as_zero = torch.where(counts_here, padded, 0)
by_sentence = each.sum(1) / lengths
choices = {
    f"all {B * T} places, padding as class 0": plain(as_zero, scores),
    f"all {B * T} places, weights 0 and 1": plain(as_zero, scores, sample_weight=counts_here),
    f"the {int(lengths.sum())} tokens, ignore_class=-1": ignoring(padded, scores),
    f"the {int(lengths.sum())} tokens, mask": plain(padded, scores, mask=counts_here),
    "each sentence first, then the mean": by_sentence.mean(),
}
for name, value in choices.items():
    print(f"{name:38s} {value.item():.6f}")
assert torch.isclose(*list(choices.values())[2:4])

# %% [markdown]
# - Padding treated as a class teaches the model to predict it.
# - A weight of 0 removes the loss but stays in the denominator, in Keras and here: the more
#   padding a batch has, the smaller its loss and its gradient.
# - `ignore_class` and `mask` leave the padding out of both. That is the mean over tokens.
# - The last is another mean: short sentences weigh as much as long ones. The loss computes it with
#   weights of `1 / length` and `"mean_with_sample_weight"`:

# %%
per_sentence = SparseCategoricalCrossentropy(
    True, ignore_class=-1, reduction="mean_with_sample_weight"
)
value = per_sentence(padded, scores, sample_weight=(1 / lengths)[:, None])
print(value.item())
assert torch.isclose(value, by_sentence.mean())

# %% [markdown]
# ## Class weights for sequences
#
# For labels `(B, T)` look the weights up as above: one for each token. `fit(class_weight=...)` of
# Keras cannot do that: it treats labels of rank 2 as one-hot, and takes the argmax along the
# *time*. With B = T = 3 there is no error:

# %%
labels = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 0]])
logits = np.random.default_rng(1).standard_normal((3, 3, 3)).astype("float32")
weights_by_class = {0: 1.0, 1: 5.0, 2: 10.0}

inputs = keras.Input((3, 3))
model = keras.Model(inputs, keras.layers.Dense(3, use_bias=False)(inputs))
model.set_weights([np.eye(3, dtype="float32")])  # gives back what it gets
model.compile(
    optimizer=keras.optimizers.SGD(0.0),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
reported = float(model.train_on_batch(logits, labels, class_weight=weights_by_class))

table = torch.tensor([weights_by_class[k] for k in range(3)])
weights = table[torch.tensor(labels)]  # (B, T), one for each token
meant = SparseCategoricalCrossentropy(True)(labels, logits, sample_weight=weights)
print("Keras's fit(class_weight=...) reports", round(reported, 6))
print("a weight for each token gives        ", round(meant.item(), 6))

# What Keras did: the weights of argmax over time, one per sentence, along the time axis.
wrong = table[torch.tensor(labels.argmax(-1))]
same = SparseCategoricalCrossentropy(True)(labels, logits, sample_weight=wrong[None].expand(3, 3))
print("weights of argmax over the time      ", round(same.item(), 6))
assert np.isclose(reported, same.item(), rtol=1e-5) and abs(reported / meant.item() - 1) > 0.05

# %% [markdown]
# ## A planted mistake, found
#
# A map as a loader might return it: the classes start at 1, the void is 255, and neither is
# documented.

# %%
explain(
    SparseCategoricalCrossentropy(from_logits=True, axis=1),
    torch.where(is_void, VOID, maps + 1),
    predictions,
)

# %% [markdown]
# With both fixes it reports nothing. With the weights it shows which pixels contribute most.

# %%
loaded = torch.where(is_void, VOID, maps + 1)
fixed = torch.where(loaded == 255, 255, loaded - 1)
explanation = explain(loss, fixed, predictions, sample_weight=pixel_weights)
assert not [finding for finding in explanation.findings if finding.is_wrong]
print(explanation)
explanation.plot()

# %% [markdown]
# What the loss costs for maps and for padded sequences, in time and in memory, is in
# [docs/speed.md](../docs/speed.md).
