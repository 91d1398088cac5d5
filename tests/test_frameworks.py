"""The recipes of docs/distributed.md in the frameworks that they are for: `make test-frameworks`.

One step on two ranks, of uneven micro-batches, is that of one process with the whole batch.
"""

import re
from pathlib import Path

import pytest
from torchrun import torchrun

GUIDE = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
RECIPES = dict(re.findall(r"```python\n# train_(\w+)\.py\n(.*?)```", GUIDE, re.DOTALL))

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

RESTS = {"lightning": LIGHTNING, "accelerate": ACCELERATE, "trainer": TRAINER}


@pytest.mark.parametrize("name", RESTS)
def test_a_step_of_two_ranks_is_that_of_one_process(name, tmp_path):
    pytest.importorskip("transformers" if name == "trainer" else name)
    recipe = RECIPES[name].replace("Accelerator()", "Accelerator(cpu=True)")
    (tmp_path / "batches.py").write_text(BATCHES)
    (tmp_path / "recipe.py").write_text(
        f"import torch\ntorch.manual_seed(0)\n{recipe}{RESTS[name]}"
    )
    torchrun(2, tmp_path / "recipe.py", tmp_path / "output")
