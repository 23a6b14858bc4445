"""Models are scored as they are, whatever they are wrapped in, and are left as they were."""

import copy

import peft
import pytest
import torch

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.sampling.quality import measure
from llamafactory_adaptive.sampling.sample_gradients import sample_losses
from tests.helpers.dynamic import start_plan
from tests.helpers.samples import DATA, EXACT, PLAIN, adapted, batches, inputs, layers, one_by_one
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """In LLaMA-Factory's own form, which only checkpoints layers with something trainable in them."""
    from llamafactory.hparams import ModelArguments
    from llamafactory.model.model_utils.checkpointing import prepare_model_for_training

    model = adapted().eval()
    expected = measure(model, layers(model), batches(DATA, 3), 9, PLAIN, quiet=True)
    checkpointed = adapted()
    prepare_model_for_training(
        checkpointed.get_base_model(), ModelArguments(model_name_or_path="x", use_reentrant_gc=reentrant)
    )
    runs = []
    for layer in checkpointed.get_base_model().model.layers:
        layer.self_attn.register_forward_hook(lambda *args: runs.append(1))
    checkpointed.train()
    terms = measure(checkpointed, layers(checkpointed), batches(DATA, 3), 9, PLAIN, quiet=True)
    assert len(runs) == 2 * 2 * 3, "each of two layers runs again in the backward pass of three batches"
    assert torch.allclose(terms.gradient_norm, expected.gradient_norm, rtol=1e-5)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing):
    model = adapted()
    model.train()
    model.get_base_model().lm_head.eval()
    before = (
        {n: m.training for n, m in model.named_modules()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: p.clone() for n, p in model.named_parameters()},
    )
    data = copy.deepcopy(DATA)
    if failing:
        data[2]["input_ids"][0] = 10_000  # outside the vocabulary
    try:
        measure(model, layers(model), batches(data, 4), 9, EXACT, quiet=True)
        assert not failing
    except IndexError:
        assert failing
    assert {n: m.training for n, m in model.named_modules()} == before[0]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before[1]
    assert all(p.grad is None and torch.equal(p, before[2][n]) for n, p in model.named_parameters())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(m, kind) for m in model.modules() for kind in hooks)


def test_layers_that_apply_dropout_themselves_do_not_while_scoring():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
                       word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.5)  # fmt: skip
    model = peft.get_peft_model(OPTForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    first, second = (measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True) for _ in range(2))
    assert torch.equal(first.gradient_norm, second.gradient_norm)
    assert model.get_base_model().model.decoder.layers[0].dropout == 0.5


def test_a_4bit_base_gives_the_norms_of_its_own_backward_passes(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu
    from tests.helpers.tiny import save_tiny

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "m"), quantization_config=four_bits)
    keep_4bit_unpacked_on_cpu(quantised)
    config = peft.LoraConfig(**lora_config_arguments(start_plan(tiny_model())), task_type="CAUSAL_LM")
    model = peft.get_peft_model(quantised, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    terms = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for index, row in enumerate(DATA):
        model.zero_grad()
        model(**inputs([row])).loss.backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        assert float(terms.gradient_norm[index]) == pytest.approx(float(norm), rel=1e-3)


def test_fused_losses_step_aside():
    """Liger computes its loss inside ``forward`` and returns no logits, but only when it is given labels."""

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids, attention_mask, labels=None, use_cache=True):
            assert labels is None
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = Fused()
    with torch.no_grad():
        assert torch.allclose(sample_losses(model, inputs(DATA[:1])), model.inner(**inputs(DATA[:1])).loss, rtol=1e-5)


def test_out_of_memory_names_the_key(monkeypatch):
    from llamafactory_adaptive.sampling import sample_gradients

    def explode(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample_gradients, "sample_losses", explode)
    model = adapted()
    with pytest.raises(CalibrationError, match="while scoring 4 samples at once: set a smaller tsq_batch_size"):
        measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)


def test_masked_components_have_no_gradient():
    from tests.helpers.dynamic import scatter, triplet_model

    model, triplets, _ = triplet_model(initial_lambda=None)
    scatter(triplets)
    masks = [[(i + j) % 2 == 0 for j in range(4)] for i in range(len(triplets.modules))]
    triplets.mask(masks)
    terms = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    _, gradients, _ = one_by_one(model.eval(), DATA)
    assert torch.allclose(terms.gradient_norm, gradients.norm(dim=1), rtol=1e-4)
