"""Libraries that call PyTorch's loss, trained with and without `xent_ext.installed()`, or `xent_ext.patch_lm_head`.

Models are tiny and made from their configuration: nothing is downloaded. Without the extra `integration` these skip.
"""

import copy
import os
import re

import pytest
import torch
import torch.nn.functional as F
from readmes import ROOT, block_with, text

import xent_ext
from bench.machine import peak_memory
from xent_ext import deferred, linear, plan

# Whatever the libraries want of the net, or to report to it, is not wanted here. Read when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

# Losses and weights after a few steps in float32, whose sums are in another order: some epsilons for each step, where
# Adam divides by the root of squares of gradients that are themselves near their rounding error.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
VOCABULARY = 97


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[integration]'")


def assert_same_training(train, calls):
    """`train` returns losses and weights. Fills `calls`, those of the fused loss, when that is installed."""
    torch.manual_seed(0)
    their_losses, their_weights = train()
    assert not calls
    torch.manual_seed(0)
    with xent_ext.installed():
        losses, weights = train()
    assert calls
    assert len(losses) > 1
    torch.testing.assert_close(losses, their_losses, **CLOSE)
    torch.testing.assert_close(weights, their_weights, **CLOSE)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- Hugging Face


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(transformers):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=32))


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def qwen3(transformers):
    config = transformers.Qwen3Config(
        **SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True
    )
    return transformers.Qwen3ForCausalLM(config)


def mistral(transformers):
    config = transformers.MistralConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)
    return transformers.MistralForCausalLM(config)


def gemma2(transformers):
    """With a cap."""
    config = transformers.Gemma2Config(
        **SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


def cohere(transformers):
    """With a factor."""
    config = transformers.CohereConfig(
        **SMALL, intermediate_size=32, num_key_value_heads=1, logit_scale=0.5, bos_token_id=1, eos_token_id=2
    )
    return transformers.CohereForCausalLM(config)


def granite(transformers):
    """With a divisor."""
    config = transformers.GraniteConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, logits_scaling=3.0)
    return transformers.GraniteForCausalLM(config)


def bert(transformers):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=32))


def texts(rows=16, length=12):
    """Tokens, and labels of which a varying share is ignored."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = tokens.masked_fill(
        torch.rand(tokens.shape, generator=generator) < torch.rand(rows, 1, generator=generator), -100
    )
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def trained(model, folder, loss=None, **arguments):
    """Losses and weights of a Trainer's steps, of two batches each."""
    transformers = library("transformers")
    library("accelerate")
    trainer = transformers.Trainer(
        model=model(transformers),
        args=transformers.TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=texts(),
        compute_loss_func=loss,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights_of(trainer.model)


@pytest.mark.parametrize("model", [llama, gpt2, bert])
def test_transformers_trainer(cpu_blocks, tmp_path, model):
    """Gradient accumulation, where the Trainer passes on how many tokens all the batches of a step have."""
    assert_same_training(lambda: trained(model, tmp_path), cpu_blocks)
    assert len(cpu_blocks) == 4 * 2
    assert {problem.reduction for problem in cpu_blocks} == {"mean" if model is bert else "sum"}


def test_transformers_label_smoother_is_not_reached(cpu_blocks, tmp_path):
    with xent_ext.installed():
        trained(llama, tmp_path, label_smoothing_factor=0.1)
    assert not cpu_blocks


def smoothed(outputs, labels, num_items_in_batch=None):
    """The loss of the guide."""
    return xent_ext.cross_entropy(
        outputs.logits, labels, label_smoothing=0.1, shift=True, normalizer=num_items_in_batch
    )


def test_transformers_with_a_loss_in_place_of_the_label_smoother(cpu_blocks, tmp_path):
    def their_loss(outputs, labels, num_items_in_batch=None):
        rows, labels = outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]
        return F.cross_entropy(rows, labels, label_smoothing=0.1, reduction="sum") / num_items_in_batch

    torch.manual_seed(0)
    theirs = trained(llama, tmp_path, their_loss, optim="sgd")
    torch.manual_seed(0)
    ours = trained(llama, tmp_path, smoothed, optim="sgd")
    assert len(cpu_blocks) == 4 * 2
    torch.testing.assert_close(ours, theirs, **CLOSE)


# --- Without logits


@pytest.fixture
def calls(monkeypatch):
    """The calls of the last layer with its loss, in chunks, and those of layers whose logits were made."""
    found = {"fused": 0, "made": 0}

    def count(name, function):
        def counted(*args):
            found[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 0)
    monkeypatch.setattr(linear, "forward", count("fused", linear.forward))
    monkeypatch.setattr(deferred.Head, "outputs", count("made", deferred.Head.outputs))
    return found


def patched(model):
    """What makes the model, patched."""

    def make(transformers):
        made = model(transformers)
        xent_ext.patch_lm_head(made)
        return made

    return make


def trained_both(model, folder, loss=None, **arguments):
    """Losses and weights with the patch, and without."""
    found = []
    for each in (patched(model), model):
        torch.manual_seed(0)
        found.append(trained(each, folder, loss, **arguments))
    return found


@pytest.mark.parametrize("model", [llama, qwen3, mistral, gpt2, gemma2, cohere, granite, bert])
def test_trainer_without_logits(calls, tmp_path, model):
    torch.testing.assert_close(*trained_both(model, tmp_path), **CLOSE)
    assert calls == {"fused": 4 * 2, "made": 0}


def test_trainer_without_logits_with_checkpoints_and_autocast(calls, tmp_path):
    """Accelerate casts all outputs to float32, which reads no logits."""
    arguments = {"gradient_checkpointing": True, "bf16": True, "optim": "sgd"}
    torch.testing.assert_close(*trained_both(llama, tmp_path, **arguments), rtol=1e-3, atol=1e-3)
    assert calls == {"fused": 4 * 2, "made": 0}


def test_label_smoother_gets_logits(calls, tmp_path):
    torch.testing.assert_close(*trained_both(llama, tmp_path, label_smoothing_factor=0.1), **CLOSE)
    assert calls == {"fused": 0, "made": 4 * 2}


def test_loss_in_place_of_the_label_smoother_without_logits(calls, tmp_path):
    """That of the guide."""
    torch.testing.assert_close(*trained_both(llama, tmp_path, smoothed, optim="sgd"), **CLOSE)
    assert calls == {"fused": 4 * 2, "made": 0}


def test_the_example_of_the_guide(calls):
    library("transformers")
    exec(block_with("xent_ext.patch_lm_head(model)"), {})
    assert calls == {"fused": 1, "made": 0}


def test_what_the_example_of_the_guide_holds():
    """At its peak, beyond the model, in MiB; of the logits are 250."""
    library("transformers")
    made, patch, step = block_with("xent_ext.patch_lm_head(model)").partition("xent_ext.patch_lm_head(model)")

    def peak(patch=""):
        names = {}
        exec(made + patch, names)
        return peak_memory(lambda: exec(step, names), torch.device("cpu"))[1] / 2**20

    found = [peak(patch)]
    with xent_ext.installed():
        found.append(peak())
    found.append(peak())
    said = re.search(
        r"holds (\d+) MiB at its peak beyond the model, its gradients included; with `install\(\)` (\d+), "
        r"without either (\d+)\.",
        " ".join(text(ROOT / "xent_ext/README.md").split()),
    )
    assert found == pytest.approx([float(number) for number in said.groups()], rel=0.05)


@pytest.mark.parametrize("model", [llama, gemma2])
def test_outputs_without_logits(calls, model):
    """In training, evaluation and generation."""
    transformers = library("transformers")
    torch.manual_seed(0)
    plain = model(transformers)
    other = copy.deepcopy(plain)
    xent_ext.patch_lm_head(other)
    batch = {name: value.unsqueeze(0) for name, value in texts(1)[0].items()}
    for mode in (True, False):
        theirs, ours = (each.train(mode)(**batch) for each in (plain, other))
        assert calls["made"] == 0
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert torch.equal(ours.logits, theirs.logits)
        kept = [each(batch["input_ids"], logits_to_keep=2).logits for each in (other, plain)]
        assert torch.equal(*kept)
        assert calls.pop("made") == (2 if mode else 0)
        calls["made"] = 0
    words = [each.generate(batch["input_ids"][:, :4], max_new_tokens=4, do_sample=False) for each in (plain, other)]
    assert torch.equal(*words)
    assert calls == {"fused": 1, "made": 0}


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"fused": 1, "made": 0}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"fused": 1, "made": 0}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"fused": 0, "made": 1}),
    ],
    ids=["elsewhere", "copied head", "on the head"],
)
def test_adapters(calls, adapters, expected):
    """One on the head needs its outputs."""
    peft, transformers = library("peft"), library("transformers")
    torch.manual_seed(0)
    batch = {name: value.unsqueeze(0) for name, value in texts(1)[0].items()}
    plain = llama(transformers)
    other = copy.deepcopy(plain)
    xent_ext.patch_lm_head(other)
    found = []
    for model in (plain, other):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(**adapters, init_lora_weights=False)).train()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*found, **CLOSE)
    assert calls == expected


def test_a_head_with_an_adapter_is_none():
    peft = library("peft")
    model = peft.get_peft_model(llama(library("transformers")), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got Linear of peft"):
        xent_ext.patch_lm_head(model)


# --- Accelerate


def test_accelerate(cpu_blocks):
    accelerate = library("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of the Trainer before

    def train():
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model = torch.nn.Linear(8, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(5, (32,)))
        model, optimizer, batches = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, 8))
        losses = []
        for x, target in batches:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return losses, weights_of(accelerator.unwrap_model(model))

    assert_same_training(train, cpu_blocks)


# --- Lightning


def test_lightning(cpu_blocks, tmp_path):
    """A fit with mixed precision."""
    lightning = library("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(8, 5)
            self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
            self.losses = []

        def training_step(self, batch, _):
            x, target = batch
            loss = self.criterion(self.model(x), target)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train():
        module = Classifier()
        data = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randint(5, (32,)))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed",
            max_epochs=2,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, 8))
        return module.losses, weights_of(module)

    assert_same_training(train, cpu_blocks)
    assert {problem.dtype for problem in cpu_blocks} == {torch.float32}


# --- Segmentation


def test_segmentation(cpu_blocks):
    """SegFormer, whose loss is over images, with pixels that are ignored."""
    transformers = library("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=5,
        semantic_loss_ignore_index=255,
    )

    def train():
        model = transformers.SegformerForSemanticSegmentation(config)
        # Not Adam: it would make steps of the rounding errors of gradients that batch normalisation makes 0.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            images, labels = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
            labels[:, :4] = 255
            loss = model(pixel_values=images, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, weights_of(model)

    assert_same_training(train, cpu_blocks)
    assert {problem.ignore_index for problem in cpu_blocks} == {255}
