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
# # A character model of Shakespeare
#
# A language model gives a distribution over the next character at every position: predictions of
# shape (B, T, V), integer labels of shape (B, T), no one-hot anywhere. The loss takes both as they
# are. An LSTM is trained on Shakespeare, compared with Keras on one batch, and then writes.

# %%
import os
import sys

import torch._dynamo  # loads Triton, which may fail to load after TensorFlow

sys.path.insert(0, "../scripts")  # for the benchmark's peak_memory
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # both frameworks on the CPU
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import copy
import gzip
import math
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import torch
import torch.nn.functional as F
from benchmark.measuring import peak_memory
from torch import nn

import torch_sce

OURS, KERAS, OTHER = "#1f6fb2", "#d1622b", "#777777"
plt.rcParams.update({"figure.figsize": (8, 4), "figure.dpi": 100})

torch.manual_seed(0)
torch.set_num_threads(1)  # the model is small
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

# %% [markdown]
# ## The text
#
# 42 works, one after the other, about five million characters. A character's number is its place
# in the sorted alphabet; it fits into one byte. The last play is kept for validation.

# %%
text = gzip.decompress(Path("data/shakespeare.txt.gz").read_bytes()).decode("ascii")
alphabet = sorted(set(text))
number = {character: i for i, character in enumerate(alphabet)}
V = len(alphabet)


def encode(string):
    """The characters' numbers, (len(string),), uint8."""
    return torch.tensor([number[character] for character in string], dtype=torch.uint8)


codes = encode(text)
split = text.rindex("THE WINTER'S TALE")
training, validation = codes[:split], codes[split:]
print(f"{len(codes):,} characters, {V} distinct, {len(validation):,} of them for validation")
print(text[1404:1647])

# %% [markdown]
# ## Labels are the inputs, shifted by one
#
# An example is a piece of T + 1 characters: the first T are the inputs, the last T the labels. The
# labels stay integers, here of one byte each; the loss takes any integer dtype. One-hot labels in
# float32 need 4 V = 336 bytes for each, 336 times as much (42 times as much as int64).

# %%
B, T = 16, 100


def pieces(source, starts):
    """Inputs (B, T), int64 as an embedding wants them, and labels (B, T), uint8."""
    piece = source[starts[:, None] + torch.arange(T + 1)]
    return piece[:, :-1].long(), piece[:, 1:]


x, y = pieces(training, torch.arange(B) * 1000)
print("inputs:", repr("".join(alphabet[i] for i in x[2, :40])))
print("labels:", repr("".join(alphabet[i] for i in y[2, :40])))
for name, count in [("a batch", B * T), ("the whole text", len(codes))]:
    print(f"labels of {name}: {count / 1e3:,.1f} kB, one-hot {4 * V * count / 1e3:,.1f} kB")

# %% [markdown]
# ## The model and the loss
#
# An embedding, an LSTM, a linear layer to V logits. `forward` also returns the LSTM's state, which
# is needed at the end, for writing.


# %%
class CharacterModel(nn.Module):
    """Characters (B, T) and a state to logits (B, T, V) and the next state."""

    def __init__(self, embedding=32, hidden=256):
        super().__init__()
        self.embedding = nn.Embedding(V, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.output = nn.Linear(hidden, V)

    def forward(self, x, state=None):
        hidden, state = self.lstm(self.embedding(x), state)
        return self.output(hidden), state


model = CharacterModel()
loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True)
logits, _ = model(x)
print("labels", tuple(y.shape), "logits", tuple(logits.shape), "loss", loss(y, logits).item())

# %% [markdown]
# `F.cross_entropy` looks for the classes on axis 1, so it treats (B, T, V) as B examples of T
# classes. It needs both arguments flattened, and wider labels. Then it gives the same.

# %%
try:
    F.cross_entropy(logits, y.long())
except RuntimeError as error:
    print("as it is:", error)
flattened = F.cross_entropy(logits.flatten(0, 1), y.flatten().long())
print("flattened:", flattened.item())

u = 2.0**-24  # float32 rounds by at most this, relatively


def tolerance(z, value):
    """How far two right losses of the same logits z may be apart; `value` is one of them.

    The sum over V classes is off by V u at most, and its logarithm as much. The differences with
    logits after that round numbers no larger than the largest logit. The mean over n rows is off
    by hardly more than 6 sqrt(n) u of its size (Higham and Mary, 2019).
    """
    rows = z.numel() // V
    return 2 * u * (V + 4 * float(abs(z).max()) + 8 + 6 * math.sqrt(rows) * value)


value = loss(y, logits).item()
assert abs(flattened.item() - value) <= tolerance(logits.detach(), value)

# %% [markdown]
# ## Training
#
# Two levels to compare with. A model that knows nothing gives every character 1/V: ln V nats. One
# that knows only how often each character occurs reaches the entropy of these frequencies. The
# optimizer is Adam; its learning rate rises to 0.01 and falls again.

# %%
frequency = training.bincount(minlength=V) / len(training)
uniform, unigram = math.log(V), torch.special.entr(frequency).sum().item()
print(f"uniform: {uniform:.2f} nats, frequencies: {unigram:.2f} nats per character")

# %%
STEPS = 1000


@torch.no_grad()
def validation_loss(model, pieces_=200):
    """The mean loss over pieces from all over the validation play."""
    x, y = pieces(validation, torch.linspace(0, len(validation) - T - 1, pieces_).long())
    return loss(y, model(x)[0]).item()


def train(model, loss_of_batch, steps=STEPS):
    """The losses of these steps, the first of STEPS, and of the validation play every 100."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=STEPS)
    draw = torch.Generator().manual_seed(1)
    history, validated = [], {0: validation_loss(model)}
    for step in range(1, steps + 1):
        x, y = pieces(training, torch.randint(len(training) - T, (B,), generator=draw))
        optimizer.zero_grad()
        value = loss_of_batch(model, x, y)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(value.item())
        if step % 100 == 0:
            validated[step] = validation_loss(model)
    return history, validated


untrained = copy.deepcopy(model)
history, validated = train(model, lambda model, x, y: loss(y, model(x)[0]))
final = validated[STEPS]
print(f"validation loss {validated[0]:.3f} nats before training, {final:.3f} after")
print(f"perplexity {math.exp(final):.2f}, bits per character {final / math.log(2):.2f}")

# %%
fig, ax = plt.subplots()
ax.plot(range(1, STEPS + 1), history, color=OURS, lw=0.8, label="training, each batch")
ax.plot(validated.keys(), validated.values(), "o", color="black", ms=5, label="validation")
ax.axhline(uniform, color=OTHER, ls="--", label=f"all characters alike, ln {V}")
ax.axhline(unigram, color=KERAS, ls="--", label="frequencies of the characters")
ax.set(xlabel="batch", ylabel="loss (nats per character)", title="Learning to spell")
ax.set_xlim(0, STEPS)
ax.set_ylim(1, 4.8)
ax.legend(loc="upper right", bbox_to_anchor=(1, 0.58))
plt.show()

# %% [markdown]
# The loss begins at the uniform level, within a tenth of a nat, because the untrained logits are
# small. It soon passes the other: the model uses what came before. The assertion has a margin of
# half a nat, far more than a validation loss varies.

# %%
assert abs(validated[0] - uniform) < 0.1
assert final < unigram - 0.5

# %% [markdown]
# Which characters are hard? With `reduction="none"` the loss gives one number for each. The first
# letters of a word cost most; once it has begun, its end is nearly free.

# %%
start = text.index("I am a feather for each wind", split)
x, y = pieces(codes, torch.tensor([start - 50]))
each = torch_sce.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
costs = each(y, model(x)[0]).detach()[0, 49:]  # of the line itself; the model has read on to it
line = [alphabet[i] for i in y[0, 49:]]
fig, ax = plt.subplots(figsize=(9, 2.6))
ax.bar(range(len(line)), costs, color=OURS)
ax.set_xticks(range(len(line)), [c if c != "\n" else "\u21b5" for c in line], family="monospace")
ax.axhline(uniform, color=OTHER, ls="--", label=f"all characters alike, ln {V}")
ax.set(xlabel="character", ylabel="loss (nats)", title="The loss of each character of a line")
ax.legend(loc="upper right", bbox_to_anchor=(1, 0.94), frameon=False)
ax.margins(x=0.01)
plt.show()

# %% [markdown]
# ## The last layer and the loss in one
#
# `LinearSparseCategoricalCrossentropy` gets what goes into the last layer, (B, T, H), with the
# layer's weight and bias. It computes the logits in chunks, each with its gradients, and never has
# them all. The same training again, from the same weights, for as many batches as show that the
# curve is the same. The first value is equal within the tolerance from above; after that the
# rounding of the weights differs, and the training makes the differences grow.

# %%
HEAD_STEPS = 300
head_loss = torch_sce.LinearSparseCategoricalCrossentropy()


def loss_of_head(model, x, y):
    hidden, _ = model.lstm(model.embedding(x))
    return head_loss(y, hidden, model.output.weight, model.output.bias)


with_head, _ = train(untrained, loss_of_head, HEAD_STEPS)
gaps = np.abs(np.array(with_head) - history[:HEAD_STEPS])
print(f"apart by {gaps[0]:.1e} for the first batch, {gaps.max():.1e} at most")
assert gaps[0] <= tolerance(logits.detach(), history[0])
assert gaps.max() < 0.05  # less than from one batch to the next

fig, ax = plt.subplots()
ax.plot(range(1, HEAD_STEPS + 1), history[:HEAD_STEPS], color="#b5d0ea", lw=4, label="all logits")
ax.plot(range(1, HEAD_STEPS + 1), with_head, color=KERAS, lw=0.8, label="logits in chunks")
ax.set(xlabel="batch", ylabel="loss (nats per character)", title="The same training, twice")
ax.set_xlim(0, HEAD_STEPS)
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# With 84 classes the logits are small. With a vocabulary of 32,000 they are the largest tensor of a
# training step, and `loss` makes another one, their gradient. The peak memory of both passes,
# beyond what was there before:

# %%
C = 32_000
hidden = torch.randn(B * T, model.lstm.hidden_size, requires_grad=True)
weight = (torch.randn(C, model.lstm.hidden_size) / 16).requires_grad_()
y = torch.randint(C, (B * T,))
calls = {
    "all logits": lambda: torch.autograd.grad(loss(y, hidden @ weight.T), [hidden, weight]),
    "logits in chunks": lambda: torch.autograd.grad(head_loss(y, hidden, weight), [hidden, weight]),
}
gradients = hidden.nbytes + weight.nbytes
print(f"the logits {4 * B * T * C / 1e6:.0f} MB, the gradients {gradients / 1e6:.0f} MB")
peaks = {name: peak_memory(call, "cpu") for name, call in calls.items()}
for name, peak in peaks.items():
    print(f"{name}: " + ("not known" if peak is None else f"{peak / 1e6:.0f} MB"))

# %% [markdown]
# All logits and their gradient are twice the size of the logits. In chunks the peak is that of the
# gradients of `hidden` and `weight`, which a backward pass returns, and one workspace of at most
# 64 MiB (`chunk_bytes`). Both assertions leave a tenth for the buffers of the matrix products, and
# for memory that was mapped before.

# %%
if None not in peaks.values():
    assert peaks["all logits"] > 0.9 * 2 * 4 * B * T * C
    assert peaks["logits in chunks"] < gradients + 1.1 * 2**26

# %% [markdown]
# ## The same batch in Keras
#
# The same model in Keras, with the trained weights. Both frameworks have the same order of gates
# (input, forget, cell, output). Keras's kernels are transposed, and its one bias is the sum of
# PyTorch's two. (To train a model that comes from Keras, freeze one
# of the two: [docs/porting.md](../docs/porting.md#an-lstm).)

# %%
hidden = model.lstm.hidden_size
keras_model = keras.Sequential(
    [
        keras.Input((T,)),
        keras.layers.Embedding(V, model.embedding.embedding_dim),
        keras.layers.LSTM(hidden, return_sequences=True),
        keras.layers.Dense(V),
    ]
)
w = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
keras_model.set_weights(
    [
        w["embedding.weight"],
        w["lstm.weight_ih_l0"].T,
        w["lstm.weight_hh_l0"].T,
        w["lstm.bias_ih_l0"] + w["lstm.bias_hh_l0"],
        w["output.weight"].T,
        w["output.bias"],
    ]
)

x, y = pieces(validation, torch.linspace(0, len(validation) - T - 1, B).long())
ours, theirs = model(x)[0].detach(), keras_model(x.numpy())
print("logits: shape", tuple(theirs.shape), "largest", float(abs(ours).max()))
apart = np.abs(ours.numpy() - theirs).max()
print(f"largest difference of the two models' logits: {apart:.1e}")
assert apart < 1e-3  # rounding is far below; gates in another order change whole units

# %% [markdown]
# Now the losses, on the same logits: the value, and the gradient with respect to the logits.

# %%
keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
with tf.GradientTape() as tape:
    tape.watch(theirs)
    keras_value = keras_loss(y.numpy(), theirs)
keras_gradient = tape.gradient(keras_value, theirs).numpy()

z = torch.tensor(theirs.numpy(), requires_grad=True)
value = loss(y, z)
value.backward()
gradient = z.grad.numpy()

print(f"loss:     tf.keras {float(keras_value):.8f}, torch_sce {value.item():.8f}")
print(f"gradient: largest entry {np.abs(gradient).max():.1e}, ", end="")
print(f"largest difference {np.abs(gradient - keras_gradient).max():.1e}")

# %% [markdown]
# An entry of the gradient is (softmax - one-hot) / (B T). Its softmax takes a sum over V classes,
# an exponential whose argument is rounded like the largest logit, and a few operations more.

# %%
largest = float(abs(ours).max())
assert abs(float(keras_value) - value.item()) <= tolerance(z.detach(), value.item())
assert np.abs(gradient - keras_gradient).max() <= 2 * u * (V + 2 * largest + 8) / (B * T)

# %% [markdown]
# ## The state, carried from character to character
#
# To write, the model gets one character at a time and has to remember. Its memory is the state that
# `forward` returns: it is passed again with the next character, and is reset for each text. (In
# Keras this is an LSTM with `stateful=True`, and its `reset_state()`.) Three ways to read the same
# five lines:
#
# - the whole lines at once,
# - character by character, the state carried over,
# - character by character, without the state.


# %%
@torch.no_grad()
def one_by_one(model, x, state=None, carry=True):
    """Logits (B, T, V), computed one character at a time; and the state at the end."""
    steps = []
    for t in range(x.shape[1]):
        z, state = model(x[:, t : t + 1], state if carry else None)
        steps.append(z)
    return torch.cat(steps, dim=1), state


precise = copy.deepcopy(model).double()
lines = x[:5]
for name, network in [("float32", model), ("float64", precise)]:
    at_once = network(lines)[0].detach()
    carried, state = one_by_one(network, lines)
    forgotten, _ = one_by_one(network, lines, carry=False)
    print(f"{name}: carried {(carried - at_once).abs().max():.1e} from the logits at once,", end="")
    print(f" not carried {(forgotten - at_once).abs().max():.1e}")

# %% [markdown]
# Carrying the state gives the same logits except for rounding, as float64 shows. The bound: a gate
# is a sum of n products, whose magnitudes add up to at most S; it is rounded by at most n u S. An
# error stays in the state for at most T steps, and reaches the logits through the output layer,
# whose rows add up to at most R. That makes 2 T n u S R for the two ways, if the LSTM itself does
# not amplify errors. In float64, u = 2^-53, even this bound of the worst case is small.

# %%
gates = torch.cat([precise.lstm.weight_ih_l0, precise.lstm.weight_hh_l0], dim=1).abs()
sizes = torch.cat([precise.embedding.weight.abs().amax(0), torch.ones(hidden)])
biases = precise.lstm.bias_ih_l0.abs() + precise.lstm.bias_hh_l0.abs()
S = (gates @ sizes + biases).max().item()
R = (precise.output.weight.abs().sum(1) + precise.output.bias.abs()).max().item()
bound = 2 * T * (gates.shape[1] + 2) * 2.0**-53 * S * R
print(f"bound {bound:.1e} (S = {S:.0f}, R = {R:.0f})")
assert (carried - at_once).abs().max() <= bound
assert (forgotten - at_once).abs().max() > 1

# %% [markdown]
# And a text must start from a fresh state. After the five lines, their state changes the
# logits of the next text; with a reset they are those of that text alone.

# %%
other = x[5:10]
alone = precise(other)[0].detach()
after, _ = one_by_one(precise, other, state)
reset, _ = one_by_one(precise, other)
print(f"state left over: {(after - alone).abs().max():.1e} from the logits of the text alone")
print(f"state reset:     {(reset - alone).abs().max():.1e}")
assert (after - alone).abs().max() > 1
assert (reset - alone).abs().max() <= bound

# %% [markdown]
# ## Five texts
#
# Five prompts go through the model side by side. While a prompt lasts, the next character is the
# prompt's; after that it is drawn from the model's distribution, sharpened by a temperature of 0.7:
# logits are divided by it before the softmax. The text depends on the last digits of the logits, so
# on another machine it may be another.

# %%
PROMPTS = [
    "ROMEO.\nO, ",
    "KING HENRY.\nMy lord",
    "LADY MACBETH.\n",
    "ACT II.\n\nSCENE 1. ",
    "Shall I compare thee",
]
LENGTH, TEMPERATURE = 300, 0.7
draw = torch.Generator().manual_seed(2)


@torch.no_grad()
def write(prompts):
    """The prompts, continued to `LENGTH` characters."""
    texts, state = list(prompts), None
    for t in range(LENGTH - 1):
        z, state = model(torch.stack([encode(text[t]) for text in texts]).long(), state)
        drawn = torch.multinomial((z[:, -1] / TEMPERATURE).softmax(-1), 1, generator=draw)
        for i, text in enumerate(texts):
            if len(text) == t + 1:
                texts[i] += alphabet[drawn[i]]
    return texts


for text in write(PROMPTS):
    print(text, end="\n\n" + 40 * "-" + "\n\n")
