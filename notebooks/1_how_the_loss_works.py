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
# # How the loss works
#
# How does the loss compare predictions with labels? Do I need a softmax? Why is it called sparse?
# What does the average divide by? Two examples are enough to see most of it, and four to see
# the rest.

# %%
import os

import torch._dynamo  # loads Triton, which may fail to load after TensorFlow

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import torch

import torch_sce
from torch_sce import explain, metrics

OURS, OTHER, GREY = "#1f6fb2", "#d1622b", "#c9d0d6"
plt.rcParams.update(
    {"figure.figsize": (8, 3.2), "figure.dpi": 100, "figure.constrained_layout.use": True}
)
torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## Logits become probabilities
#
# A model gives each example one number per class, its *logits*. The softmax turns them into
# probabilities: $p_j = e^{z_j} / \sum_k e^{z_k}$. The label selects one of them.

# %%
logits = torch.tensor([[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]])
labels = torch.tensor([2, 1])

probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
assert torch.allclose(probabilities, logits.softmax(-1))
print(probabilities)

# %%
figure, panels = plt.subplots(2, 2, sharex=True, figsize=(8, 4))
for row, (left, right) in enumerate(panels):
    colors = [OURS if j == labels[row] else GREY for j in range(4)]
    left.bar(range(4), logits[row], color=colors)
    left.axhline(0, color="black", lw=0.6)
    left.set_ylabel(f"example {row}\nlogit")
    right.bar(range(4), probabilities[row], color=colors)
    right.set(ylim=(0, 1), ylabel="probability")
    right.annotate(
        f"p = {probabilities[row, labels[row]]:.4f}",
        (labels[row], probabilities[row, labels[row]]), xytext=(0, 4),
        textcoords="offset points", ha="center", color=OURS,
    )  # fmt: skip
panels[0, 0].set_title("logits of the model")
panels[0, 1].set_title("after the softmax")
for panel in panels[1]:
    panel.set(xlabel="class (blue: the label)", xticks=range(4))
plt.show()

# %% [markdown]
# ## The loss of an example: $-\log p$ of its label
#
# Nothing else about the row matters once it is a distribution: the more probable the label, the
# smaller the loss. A certain, right prediction has loss 0; for a wrong one the loss is unbounded.

# %%
p = probabilities[torch.arange(2), labels]
losses = -p.log()
print("p of the label:", p.tolist())
print("-log p        :", losses.tolist())

# %%
curve = np.linspace(0.01, 1, 300)
plt.plot(curve, -np.log(curve), color=GREY, lw=2)
for row in range(2):
    plt.scatter(p[row], losses[row], color=OURS, zorder=3)
    plt.annotate(
        f"example {row}: {losses[row]:.4f}", (p[row], losses[row]), xytext=(8, 4),
        textcoords="offset points", color=OURS,
    )  # fmt: skip
plt.axhline(np.log(4), color=OTHER, lw=1, ls="--")
plt.annotate("guessing among 4 classes: log 4 = 1.386", (0.55, np.log(4) + 0.1), color=OTHER)
plt.xlabel("probability of the label")
plt.ylabel("loss [nats]")
plt.title("The loss of an example is -log p")
plt.show()
# %% [markdown]
# ## The loss of a batch: their mean
#
# There are two ways to the same number: pass the logits and `from_logits=True`, or take the softmax
# yourself. The first is exact for any logits and is preferred; more on that below.

# %%
from_logits = torch_sce.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
softmax_first = torch_sce.SparseCategoricalCrossentropy()(labels, logits.softmax(-1))
print("from_logits=True:", from_logits.item())
print("softmax first   :", softmax_first.item())
print("the mean        :", losses.mean().item())
assert from_logits.item() == 0.9133191704750061
assert abs(softmax_first.item() - from_logits.item()) <= 2**-23  # one rounding of float32

# %% [markdown]
# tf.keras gives the same, to the last digit, both ways.

# %%
KerasLoss = tf.keras.losses.SparseCategoricalCrossentropy
softmax = tf.keras.layers.Softmax()
y_true, z = labels.numpy(), tf.constant(logits.numpy())
print("from_logits=True:", float(KerasLoss(from_logits=True)(y_true, z)))
print("softmax first   :", float(KerasLoss()(y_true, softmax(z))))
assert float(KerasLoss(from_logits=True)(y_true, z)) == from_logits.item()
assert float(KerasLoss()(y_true, softmax(z))) == from_logits.item()

# %% [markdown]
# Here the two ways agree because the logits are small. Where they are far apart, Keras may
# surprise: it checks where its predictions come from and uses the logits under a softmax layer.
# Only an array without this history, such as `model.predict(x)` returns, is treated as plain
# probabilities. PyTorch cannot see how a tensor was computed: you choose.

# %%
far, label = np.array([[50.0, 0.0, -50.0]], np.float32), np.array([2])
print("Keras, softmax layer            ", float(KerasLoss()(label, softmax(far))))
print("Keras, the same as an array     ", float(KerasLoss()(label, softmax(far).numpy())))
print(
    "torch_sce, from_logits=True     ",
    torch_sce.SparseCategoricalCrossentropy(True)(label, far).item(),
)
p_far = torch.tensor(far).softmax(-1)
print(
    "torch_sce, softmax first        ",
    torch_sce.SparseCategoricalCrossentropy()(label, p_far).item(),
)
assert float(KerasLoss()(label, softmax(far))) == 100
assert abs(float(KerasLoss()(label, softmax(far).numpy())) - 16.118) < 1e-3

# %% [markdown]
# ### A check anybody can do
#
# A popular tutorial prints 0.119 and 0.8369 as the losses of these two examples. That cannot be.
# A loss of 0.119 needs a label with $p = e^{-0.119} = 0.89$, and no probability above is close to
# that; and the two would have the mean 0.478, not the 0.9133 that is given on the same page.

# %%
claimed = np.array([0.119, 0.8369])
print(
    "probabilities they would need:", np.exp(-claimed).round(3), " mean:", claimed.mean().round(4)
)
print("largest probabilities there are:", probabilities.max(-1).values.tolist())
assert np.exp(-claimed[0]) > probabilities.max() and abs(claimed.mean() - 0.9133) > 0.4
np.testing.assert_allclose(losses, [1.5542, 0.2724], atol=5e-5)

# %% [markdown]
# ## One call that shows all of it
#
# `explain` does these steps for your own batch, and looks for the usual mistakes.

# %%
explain(torch_sce.SparseCategoricalCrossentropy(from_logits=True), labels, logits)

# %% [markdown]
# Without `from_logits=True` it says what goes wrong: logits are clipped to [0, 1] as if they were
# probabilities, and what was clipped has no gradient.

# %%
explain(torch_sce.SparseCategoricalCrossentropy(), labels, logits)

# %% [markdown]
# ## Do I need a softmax?
#
# No: leave it out of the model and pass `from_logits=True`. Probabilities in float32 cannot hold
# what logits can. Below, the label's logit is further and further below the largest one. From
# probabilities the loss stops at $-\log 10^{-7} = 16.1$ and the gradient at the label is zero, so
# the model learns nothing from its worst mistakes.

# %%
gaps = torch.linspace(0, 40, 200)
rows = torch.stack([gaps, torch.zeros_like(gaps)], -1)
zeros = torch.ones(200, dtype=torch.long)
curves = {}
for name, loss in (
    ("from_logits=True", torch_sce.SparseCategoricalCrossentropy(True, reduction="none")),
    ("softmax first", torch_sce.SparseCategoricalCrossentropy(reduction="none")),
):
    leaf = rows.clone().requires_grad_()
    values = loss(zeros, leaf if "logits" in name else leaf.softmax(-1))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    curves[name] = values.detach(), -gradient[:, 1]

figure, (left, right) = plt.subplots(1, 2)
for (name, (values, pull)), style in zip(curves.items(), ("-", "--"), strict=True):
    left.plot(gaps, values, style, label=name, color=OURS if style == "-" else OTHER)
    right.plot(gaps, pull, style, label=name, color=OURS if style == "-" else OTHER)
left.set(xlabel="largest logit - the label's", ylabel="loss [nats]", title="value")
right.set(
    xlabel="largest logit - the label's",
    ylabel="- d loss / d logit of the label",
    title="pull on the label",
)
left.legend(frameon=False)
assert curves["softmax first"][0].max() < 16.2 and curves["softmax first"][1][-1] == 0
assert curves["from_logits=True"][1][-1] == 1
plt.show()

# %% [markdown]
# ## Why is it called sparse?
#
# A label can be a class number, `2`, or a row of zeros with a single 1, *one-hot*. The loss is the
# same. The number is called the sparse form, because it leaves out the zeros.

# %%
one_hot = torch.nn.functional.one_hot(labels, 4)
dense = torch_sce.CategoricalCrossentropy(from_logits=True)(one_hot, logits)
print("class numbers", labels.tolist(), "->", from_logits.item())
print("one-hot      ", one_hot.tolist(), "->", dense.item())
assert abs(dense.item() - from_logits.item()) <= 2**-23

# %% [markdown]
# The memory of the zeros: labels of a batch of 32 sequences of 512 tokens, over the number of
# classes. At the vocabulary of GPT-2 they are 131 kB as class numbers and 3.3 GB as one-hot.

# %%
classes = np.array([10, 100, 1000, 10_000, 50_257, 128_256])
tokens = 32 * 512
number_bytes = torch.zeros(tokens, dtype=torch.int64).nbytes * np.ones(len(classes))
one_hot_bytes = tokens * classes * torch.float32.itemsize
plt.loglog(classes, one_hot_bytes, "o-", color=OTHER, label="one-hot, float32")
plt.loglog(classes, number_bytes, "o-", color=OURS, label="class numbers, int64")
plt.yticks([1e5, 1e6, 1e7, 1e8, 1e9, 1e10], ["100 kB", "1 MB", "10 MB", "100 MB", "1 GB", "10 GB"])
plt.xlabel("classes")
plt.ylabel("memory of the labels")
plt.title("Labels of 32 sequences of 512 tokens")
plt.legend(frameon=False)
plt.show()
print(f"at 50257 classes: {number_bytes[4] / 1e3:.0f} kB and {one_hot_bytes[4] / 1e9:.1f} GB")

# %% [markdown]
# ## What does the average divide by?
#
# Four examples, with weights, one of them ignored. Each reduction is a sum divided by something:
#
# | reduction | divides by |
# |---|---|
# | `"none"` | nothing: one value per position |
# | `"sum"` | nothing: the sum |
# | `"sum_over_batch_size"`, the default, also `"mean"` | the number of positions that count |
# | `"mean_with_sample_weight"` | the sum of their weights |

# %%
four_logits = torch.cat([logits, torch.tensor([[0.0, 0.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])])
four_labels = torch.tensor([2, 1, 2, -1])
weights = torch.tensor([1.0, 2.0, 0.5, 1.0])

values = {}
for reduction in ("none", "sum", "sum_over_batch_size", "mean_with_sample_weight"):
    loss = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1, reduction=reduction)
    values[reduction] = loss(four_labels, four_logits, sample_weight=weights)
    print(f"{reduction:24s}", values[reduction].tolist())

assert torch.isclose(values["sum"], values["none"].sum())
assert torch.isclose(values["sum_over_batch_size"], values["none"].sum() / 3)
assert torch.isclose(values["mean_with_sample_weight"], values["none"].sum() / 3.5)

# %%
figure, (left, right) = plt.subplots(1, 2)
left.bar(range(4), values["none"], color=[OURS, OURS, OURS, GREY])
left.set(
    xlabel="position (the last is ignored)",
    ylabel="weight * loss [nats]",
    title="four losses",
    xticks=range(4),
)
names = ["sum", "sum_over_batch_size", "mean_with_sample_weight"]
right.barh(names[::-1], [values[name].item() for name in names[::-1]], color=OURS)
for row, (name, divisor) in enumerate(zip(names[::-1], ["3.5", "3", "1"], strict=True)):
    right.annotate(f" / {divisor}", (values[name].item(), row), va="center")
right.set(
    xlabel="value [nats]", title="and their reductions", xlim=(0, values["sum"].item() * 1.15)
)
plt.show()
# %% [markdown]
# `explain` shows the same: numerator, denominator, and what each position adds.

# %%
loss = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1)
explanation = explain(loss, four_labels, four_logits, sample_weight=weights)
print(explanation)
explanation.plot()

# %% [markdown]
# ## Which metric should I use?
#
# `SparseCategoricalAccuracy`: its labels are class numbers, too. It only compares predictions,
# so it takes logits as they are. Keras's `"accuracy"` in `compile` is this one.

# %%
accuracy = metrics.SparseCategoricalAccuracy()
accuracy.update_state(labels, logits)
print("the largest:", logits.argmax(-1).tolist(), "labels:", labels.tolist())
print("accuracy:", accuracy.result().item())
assert accuracy.result().item() == 0.5

# %% [markdown]
# ## Sequences
#
# Labels are `(batch, time)`, predictions `(batch, time, vocabulary)`, without reshaping. The
# default divides by `batch * time`. `F.cross_entropy` expects the classes on axis 1: it needs both
# flattened, and if time and vocabulary happen to have the same size it silently uses the wrong
# axis.

# %%
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 7, (2, 5), generator=generator)
scores = torch.randn(2, 5, 7, generator=generator)
loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True)
print("torch_sce                     ", loss(tokens, scores).item())

flat = torch.nn.functional.cross_entropy(scores.reshape(-1, 7), tokens.reshape(-1))
print("F.cross_entropy, both flattened", flat.item())
assert torch.isclose(loss(tokens, scores), flat)

square = torch.randn(2, 7, 7, generator=generator)
tokens = torch.randint(0, 7, (2, 7), generator=generator)
print("T = C, torch_sce               ", loss(tokens, square).item())
print("T = C, F.cross_entropy as it is", torch.nn.functional.cross_entropy(square, tokens).item())

# %% [markdown]
# The next notebook ports a whole model; `explain` works on its batches as on these.
