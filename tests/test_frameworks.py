"""docs/frameworks.md: its snippets in the frameworks, `make test-frameworks`.

Weights after some steps are those of a loop in PyTorch with `F.cross_entropy`.
"""
# pyright: reportMissingImports=false

import copy
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from documents import scripts_of
from torch.testing import assert_close
from torchrun import torchrun

if find_spec("executorch") is None:  # the last that the target installs
    pytest.skip("runs in the environment of make test-frameworks", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks
PAGE = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text()
SCRIPTS = scripts_of(PAGE)


@pytest.fixture(autouse=True)
def files_are_written_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def run(*names, changes=()):
    """The variables after the setting of the page and these scripts, with `changes` of the code."""
    code = "".join(SCRIPTS[f"{name}.py"] for name in ("setting", *names))
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    found = {}
    exec(code, found)
    return SimpleNamespace(**found)


def mean_loss(model, x, y):
    return F.cross_entropy(model(x), y, ignore_index=-1)


def trained(model, loader, epochs=2, lr=0.1):
    """A copy, after steps of SGD."""
    model = copy.deepcopy(model)
    for _ in range(epochs):
        for x, y in loader:
            step(model, mean_loss(model, x, y), lr)
    return model


def step(model, value, lr=0.1):
    descend(model, torch.autograd.grad(value, list(model.parameters())), lr)


def descend(model, gradients, lr):
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= lr * gradient


def assert_same_weights(model, expected):
    found = [parameter.detach() for parameter in model.parameters()]
    assert_close(found, [parameter.detach() for parameter in expected.parameters()])


# Lightning


def lightning(precision, epochs):
    options = f'max_epochs={epochs}, precision="{precision}", accelerator="cpu", logger=False'
    quiet = "enable_progress_bar=False, enable_model_summary=False"
    changes = [('max_epochs=2, precision="bf16-mixed"', f"{options}, {quiet}")]
    return run("lightning_module", changes=changes)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision):
    found, one = lightning(precision, 2), run().model
    total, right, count = 0.0, 0, 0
    for number, (x, y) in enumerate([*found.loader, *found.loader]):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            z = one(x)
            value = F.cross_entropy(z, y, ignore_index=-1)
        step(one, value)
        counted = y != -1
        if number >= len(found.loader):  # what is logged is that of the last epoch
            total += value.item() * counted.sum().item()
            right += (z.argmax(1) == y)[counted].sum().item()
            count += counted.sum().item()
    assert_same_weights(found.model, one)
    logged = found.trainer.callback_metrics
    assert logged["loss"].item() == pytest.approx(total / count)
    assert logged["accuracy"].item() == pytest.approx(right / count)


def test_a_checkpoint_of_lightning_has_the_weights_alone_and_resumes():
    one = run().model
    found = lightning("32-true", 1)
    found.trainer.save_checkpoint("epoch.ckpt")
    state = torch.load("epoch.ckpt")["state_dict"]
    assert list(state) == [f"model.{name}" for name in one.state_dict()]
    again = lightning("32-true", 0)
    again.trainer.fit_loop.max_epochs = 2
    again.trainer.fit(again.Classifier(), again.loader, ckpt_path="epoch.ckpt")
    assert_same_weights(again.model, trained(one, found.loader))


# Trainer


def tokens(index):
    ids = torch.randint(100, (12,), generator=torch.Generator().manual_seed(index))
    return {"input_ids": ids, "labels": ids.where(torch.arange(12) < 2 + index % 9, -100)}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip


def llama_loss(model, examples):
    ids, labels = (torch.stack([each[name] for each in examples]) for name in examples[0])
    z = model(ids).logits[:, :-1]
    return F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten())


def fit_llama(compute_loss, accumulation, examples):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "output", per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        max_steps=3, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        llama(), arguments, train_dataset=examples, eval_dataset=examples[:8],
        compute_loss_func=compute_loss,
    )  # fmt: skip
    trainer.train()
    return trainer, [each["loss"] for each in trainer.state.log_history[:3]]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer(accumulation):
    one, examples = llama(), [tokens(index) for index in range(6 * accumulation)]
    trainer, logged = fit_llama(run("train_trainer").compute_loss, accumulation, examples)
    values = []
    for number in range(3):
        value = llama_loss(one, examples[2 * accumulation * number :][: 2 * accumulation])
        step(one, value)
        values.append(value.item())
    assert logged == pytest.approx(values, rel=1e-4)  # rounded
    assert_same_weights(trainer.model, one)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(llama_loss(one, examples[:8]).item())


def test_without_the_denominator_the_trainer_reports_a_sum_of_means():
    loss = run().SparseCategoricalCrossentropy(True, ignore_class=-100)

    def mean(outputs, labels, num_items_in_batch=None):
        return loss(labels[:, 1:], outputs.logits[:, :-1])

    examples = [tokens(index) for index in range(24)]
    _, logged = fit_llama(mean, 4, examples)
    means = [llama_loss(llama(), examples[i : i + 2]).item() for i in (0, 2, 4, 6)]
    assert logged[0] == pytest.approx(sum(means), rel=1e-4)


# Accelerate


def test_accelerate():
    changes = [("Accelerator()", "Accelerator(cpu=True)")]
    found = run("train_accelerate", changes=changes)
    one = copy.deepcopy(found.model)
    for _ in range(3):
        found.step([(found.x[a:b], found.y[a:b]) for a, b in [(0, 4), (4, 5), (5, 16)]])
    assert_same_weights(found.model, trained(one, [(found.x[:16], found.y[:16])], 3))


# skorch


def test_a_search_of_skorch_is_that_of_a_loop():
    from sklearn.model_selection import StratifiedKFold

    start, found = run(), run("skorch_search")
    x, y = start.x[start.y != -1], start.y[start.y != -1]
    scores = []
    for lr in found.search.param_grid["lr"]:
        losses = []
        for train, test in StratifiedKFold(3).split(x, y):
            batches = torch.as_tensor(train).split(16)
            model = trained(start.model, [(x[rows], y[rows]) for rows in batches], 10, lr)
            losses.append(mean_loss(model, x[test], y[test]).item())
        scores.append(-sum(losses) / len(losses))
    assert found.search.cv_results_["mean_test_score"] == pytest.approx(scores, rel=1e-4)
    assert scores.index(max(scores)) == found.search.best_index_
    assert found.search.best_index_ > 0  # what it is where every score is NaN
    assert found.probabilities.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("from_logits", [True, False])
def test_probabilities_of_skorch(from_logits):
    from skorch import NeuralNetClassifier

    import torch_sce

    start = run()
    x, y = start.x, start.y.clamp(0)
    ends = [] if from_logits else [torch.nn.Softmax(-1)]
    criterion = torch_sce.SparseCategoricalCrossentropy(from_logits).as_criterion()
    model = torch.nn.Sequential(*copy.deepcopy(start.model), *ends)
    options = {"train_split": None, "batch_size": 16, "max_epochs": 2, "lr": 0.1, "verbose": 0}
    net = NeuralNetClassifier(model, criterion=criterion, **options).fit(x.numpy(), y.numpy())
    expected = trained(start.model, list(zip(x.split(16), y.split(16), strict=True)))
    assert_close(torch.from_numpy(net.predict_proba(x.numpy())), expected(x).softmax(-1).detach())


# Ignite


def test_ignite():
    start, found = run(), run("ignite_trainer")
    one = trained(start.model, start.loader)
    assert_same_weights(found.model, one)
    mean = found.evaluator.state.metrics["loss"]
    assert mean == pytest.approx(mean_loss(one, start.x, start.y).item())


# fastai


def test_fastai():
    start, found = run(), run("fastai_learner")
    one = trained(start.model, start.loader)
    assert_same_weights(found.model, one)
    z = one(start.x).detach()
    assert_close(found.probabilities, z.softmax(-1))
    assert torch.equal(found.classes, z.argmax(-1))
    each = F.cross_entropy(z, start.y, ignore_index=-1, reduction="none")
    assert_close(found.losses, each)
    assert found.criterion.reduction == "mean"
    assert_close(found.mean, mean_loss(one, start.x, start.y).detach())
    means = [mean_loss(one, x, y).item() for x, y in start.loader]
    assert found.learner.validate()[0] == pytest.approx(sum(means) / 3)  # of equal sizes


# Opacus


def clipped(model, loader, bound):
    """A copy, after steps with the gradient of each example clipped; and how many were."""
    model, count = copy.deepcopy(model), 0
    for x, y in loader:
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for each, labels in zip(x, y, strict=True):
            each, labels = each.view(-1, 8), labels.view(-1)
            value = F.cross_entropy(model(each), labels, ignore_index=-1, reduction="sum")
            value = value / (labels != -1).sum().clamp(min=1)
            gradients = torch.autograd.grad(value, list(model.parameters()))
            norm = math.hypot(*(gradient.norm() for gradient in gradients))
            count += norm > bound
            for part, gradient in zip(total, gradients, strict=True):
                part += gradient * min(1, bound / (norm + 1e-6))
        descend(model, [part / len(x) for part in total], 0.1)
    return model, count


EXACT = [
    ("noise_multiplier=1.0", "noise_multiplier=0.0, poisson_sampling=False"),
    ("max_grad_norm=1.0", "max_grad_norm=1.7"),
]


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_opacus(mode):
    if mode == "ghost":
        found = run("opacus_ghost", changes=EXACT)
        assert found.criterion.criterion.reduction == "mean"
    else:
        found = run("opacus_hooks", changes=[*EXACT, ('mode="hooks"', f'mode="{mode}"')])
    start = run()
    one, count = clipped(start.model, start.loader, 1.7)
    assert 0 < count < (start.y != -1).sum()
    assert_same_weights(found.model, one)


def test_sequences_in_opacus():
    """Clipped as a whole."""
    line = "criterion(z.flatten(0, 1), y.flatten(), shape=z.shape)"
    assert line in PAGE
    sequences = ("y[:10] = -1", "y[:10] = -1\nx, y = x.view(-1, 3, 8), y.view(-1, 3)")
    call = ("    criterion(model(x), y).", f"    z = model(x)\n    {line}.")
    found = run("opacus_ghost", changes=[EXACT[0], sequences, call])
    start = run(changes=[sequences])
    one, count = clipped(start.model, start.loader, 1.0)
    assert 0 < count < len(start.y)
    assert_same_weights(found.model, one)


@pytest.mark.parametrize("name", ["opacus_ghost", "opacus_hooks"])
def test_empty_batches_of_opacus(name):
    """Its sampling draws batches of any size."""
    loop = "for x, y in loader:\n"
    changes = [(loop, f"sizes = []\n{loop}    sizes.append(len(y))\n")]
    found = run(name, changes=[*changes, ("batch_size=16", "batch_size=1")])
    assert {0, 1, 2} <= set(found.sizes)
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())


# torchmetrics


def test_torchmetrics():
    found = run("collection")
    counted = found.y != -1
    z, y = found.model(found.x).detach()[counted], found.y[counted]
    expected = {
        "loss": F.cross_entropy(z, y),
        "accuracy": (z.argmax(1) == y).float().mean(),
        "top-2": (z.topk(2).indices == y[:, None]).any(1).float().mean(),
    }
    computed = found.training.compute()
    assert_close(computed, {f"training/{name}": value for name, value in expected.items()})
    found.validation.update(z, z.argmax(1))  # all right: both accuracies are 1
    for kept in (found.validation, found.training.clone(prefix="validation/")):
        assert len(kept.compute_groups) == 3
        kept.reset()
        kept.update(z[:5], y[:5])
        assert_close(kept["loss"].compute(), F.cross_entropy(z[:5], y[:5]))
    both = found.MetricCollection(
        {name: found.metrics.SparseCategoricalAccuracy() for name in ("one", "two")}
    )
    for part in zip(z.split(7), y.split(7), strict=True):
        both.update(*part)
    assert len(both.compute_groups) == 1
    assert_close(list(both.compute().values()), [expected["accuracy"]] * 2)


# Export


def in_pytorch(found):
    return found.exported.module()


def in_onnx(found):
    from onnxruntime import InferenceSession

    session = InferenceSession("loss.onnx")
    return lambda x, y: torch.from_numpy(session.run(None, {"x": x.numpy(), "y": y.numpy()})[0])


def in_executorch(found):
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(found.program.buffer).load_method("forward")
    return lambda x, y: method.execute((x, y))[0].clone()


@pytest.mark.parametrize(("scripts", "runtime"), [
    (["export"], in_pytorch),
    (["export", "export_onnx"], in_onnx),
    (["export", "export_executorch"], in_executorch),
])  # fmt: skip
def test_exported(scripts, runtime):
    found = run(*scripts)
    compute = runtime(found)
    for rows in (48, 5, 1):
        x, y = found.x[-rows:], found.y[-rows:]
        assert (y != -1).any()
        assert_close(compute(x, y).detach(), mean_loss(found.model, x, y).detach())
    assert compute(x, torch.full_like(y, 7)).isnan()


BATCHES = """
import torch

def of_rank(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(n, 8, generator=generator), torch.randint(-1, 5, (n,), generator=generator))
        for n in (4, 1 + 3 * rank)
    ]

def check(layer):
    torch.manual_seed(0)
    one = torch.nn.Linear(8, 5)
    x, y = (torch.cat(parts) for parts in zip(*of_rank(0), *of_rank(1)))
    torch.nn.functional.cross_entropy(one(x), y, ignore_index=-1).backward()
    torch.testing.assert_close(layer.weight, one.weight - 0.1 * one.weight.grad)
"""

LIGHTNING = """
import batches

class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 2  # one for each rank

    def __getitem__(self, index):
        return batches.of_rank(index)

torch.manual_seed(0)
model = Model()
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(model, torch.utils.data.DataLoader(Steps(), batch_size=None))
batches.check(model.layer)
"""

ACCELERATE = """
import batches

step(batches.of_rank(accelerator.process_index))
batches.check(accelerator.unwrap_model(model))
accelerator.end_training()
"""

TRAINER = """
import copy, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(100, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.where(torch.arange(12) < 2 + index, -100)}

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2,
))
one = copy.deepcopy(model)
arguments = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
    optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
    report_to=[], save_strategy="no", disable_tqdm=True,
)
Trainer(model, arguments, train_dataset=Data(), compute_loss_func=compute_loss).train()
every = [Data()[index] for index in range(8)]
ids, labels = (torch.stack([each[name] for each in every]) for name in ("input_ids", "labels"))
z = one(ids).logits[:, :-1]
torch.nn.functional.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten()).backward()
for found, start in zip(model.parameters(), one.parameters()):
    torch.testing.assert_close(found, start - 0.1 * start.grad)
"""


PIPELINE = """
torch.manual_seed(0)
one = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 5))
torch.nn.functional.cross_entropy(one(x), y, ignore_index=-1).backward()
torch.testing.assert_close(model[rank].weight.grad, one[rank].weight.grad)
"""


def test_a_pipeline(tmp_path):
    (tmp_path / "pipeline.py").write_text(SCRIPTS["pipeline.py"] + PIPELINE)
    printed = torchrun(2, tmp_path / "pipeline.py").stdout.strip()
    assert printed and f"prints `{printed}`" in PAGE


RANKS = {"lightning": LIGHTNING, "accelerate": ACCELERATE, "trainer": TRAINER}


@pytest.mark.parametrize("name", RANKS)
def test_a_step_of_two_ranks_is_that_of_one_process(name, tmp_path):
    recipe = SCRIPTS[f"train_{name}.py"].replace("Accelerator()", "Accelerator(cpu=True)")
    (tmp_path / "batches.py").write_text(BATCHES)
    (tmp_path / "recipe.py").write_text(
        f"import torch\ntorch.manual_seed(0)\n{recipe}{RANKS[name]}"
    )
    torchrun(2, tmp_path / "recipe.py", tmp_path / "output")
