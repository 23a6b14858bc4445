"""Per-sample gradients from whole batches against one backward pass per sample."""

import copy

import peft
import pytest
import torch

from llamafactory_adaptive.adapter.lora import live_layers, lora_config_arguments
from llamafactory_adaptive.calibration.batches import length_sorted, make_batches
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.sampling.quality import measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec, sample_losses, squared_norms
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import ARCHITECTURES, rows, tiny_model


STEP = 0.01
DATA = rows(9)
PLAIN = TermSpec(STEP, False, "none", 64, 0)
EXACT = TermSpec(STEP, True, "exact", 64, 0)


def adapted(architecture="llama", trained=True, **sizes):
    """A tiny model with a LoRA adapter whose B is not zero."""
    base = tiny_model(architecture, **sizes)
    config = peft.LoraConfig(**lora_config_arguments(start_plan(base)), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and trained:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def layers(model):
    return {name: (layer.lora_A[a], layer.lora_B[a]) for name, (layer, a) in live_layers(model).items()}


def inputs(data, pad_id=0):
    (one,) = make_batches(data, len(data), pad_id)
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def batches(data, size, pad_id=0):
    groups = length_sorted([len(row["input_ids"]) for row in data], size)
    return [(group, inputs([data[index] for index in group], pad_id)) for group in groups]


def one_by_one(model, data):
    """Loss, gradient (flat, fp64), loss after a step on the sample: one backward pass each, the obvious way."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in data:
        model.zero_grad()
        loss = model(**inputs([row])).loss
        loss.backward()
        gradients = [p.grad.clone() for p in trained]
        stepped = copy.deepcopy(model)
        for p, g in zip((p for p in stepped.parameters() if p.requires_grad), gradients, strict=True):
            p.data.sub_(STEP * g)
        with torch.no_grad():
            after = stepped(**inputs([row])).loss
        found.append((float(loss.detach()), torch.cat([g.flatten() for g in gradients]).double(), float(after)))
    model.zero_grad()
    losses, flat, afters = zip(*found, strict=True)
    return torch.tensor(losses).double(), torch.stack(flat), torch.tensor(afters).double()


@pytest.mark.parametrize("trained", [True, False], ids=["", "new adapter"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_terms_are_those_of_one_backward_pass_per_sample(architecture, trained):
    model = adapted(architecture, trained).eval()
    losses, gradients, afters = one_by_one(model, DATA)
    mean = gradients.mean(0)
    found = measure(model, layers(model), batches(DATA, 4), 9, EXACT, quiet=True)
    assert torch.allclose(found.loss, losses, rtol=1e-5)
    assert torch.allclose(found.gradient_norm, gradients.norm(dim=1), rtol=1e-4)
    assert torch.allclose(found.alignment, gradients @ mean / mean.norm(), rtol=1e-4, atol=1e-6 * float(mean.norm()))
    assert torch.allclose(found.loss_drop, losses - afters, rtol=1e-3, atol=3e-6)
    first_order = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    assert torch.allclose(first_order.loss_drop, STEP * gradients.square().sum(1), rtol=1e-4)
    assert (first_order.alignment == 0).all()


def test_batches_and_padding_do_not_matter():
    model = adapted().eval()
    expected = measure(model, layers(model), batches(DATA, 1), 9, EXACT, quiet=True)  # no padding at all
    for size, pad_id in ((4, 0), (9, 7), (9, 200)):
        found = measure(model, layers(model), batches(DATA, size, pad_id), 9, EXACT, quiet=True)
        for name, values in vars(expected).items():
            tolerance = {"rtol": 1e-4, "atol": 3e-6 if name == "loss_drop" else 1e-7}
            assert torch.allclose(getattr(found, name), values, **tolerance), name


def of_two_processes(model, whole, wanted):
    """Each scores every other batch, in a thread of its own; sums over processes are taken where both have arrived."""
    import threading

    barrier, slots, found = threading.Barrier(2), {}, {}

    def work(rank):
        def all_reduce_sum(tensor):
            slots[rank] = tensor.clone()
            barrier.wait(60)
            total = slots[0] + slots[1]
            barrier.wait(60)
            return tensor.copy_(total)

        own = copy.deepcopy(model)
        found[rank] = measure(own, layers(own), whole[rank::2], 9, wanted, all_reduce_sum, quiet=True)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0], found[1]


@pytest.mark.parametrize("wanted", [PLAIN, EXACT, TermSpec(STEP, False, "projected", 64, 3)],
                         ids=["", "exact", "projected"])  # fmt: skip
def test_two_processes_find_what_one_does(wanted):
    model = adapted().eval()
    whole = batches(DATA, 2)
    expected = measure(model, layers(model), whole, 9, wanted, quiet=True)
    for found in of_two_processes(model, whole, wanted):
        for name, values in vars(expected).items():
            if name == "alignment":  # the mean gradient is summed in another order
                assert torch.allclose(found.alignment, values, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(getattr(found, name), values), name


def test_a_process_without_batches_takes_part_in_every_sum():
    model, calls = adapted().eval(), []
    measure(model, layers(model), [], 9, EXACT, lambda t: calls.append(t.shape) or t, True)
    alone = []
    measure(model, layers(model), batches(DATA, 9), 9, EXACT, lambda t: alone.append(t.shape) or t, True)
    assert calls == alone


def test_projections_estimate_alignments_without_bias():
    model = adapted().eval()
    _, gradients, _ = one_by_one(model, DATA)
    estimates = []
    for seed in range(40):
        found = measure(
            model, layers(model), batches(DATA, 9), 9, TermSpec(STEP, False, "projected", 2048, seed), quiet=True
        )
        mean = found.alignment.mean()  # |mean p|: the mean of <p_i, mean p> / |mean p|
        estimates.append(found.alignment * mean)
    exact = gradients @ gradients.mean(0)
    average = torch.stack(estimates).mean(0)
    spread = torch.stack(estimates).std(0) / 40**0.5
    # <p_i, mean p> is unbiased but for the term of i with itself, which is unbiased as well.
    assert ((average - exact).abs() < 4 * spread + 1e-9).all()
    assert float(torch.corrcoef(torch.stack([estimates[0], exact]))[0, 1]) > 0.95


def test_both_ways_of_the_ghost_norm_agree():
    generator = torch.Generator().manual_seed(0)
    for tokens, k, j in ((3, 40, 30), (50, 8, 4)):
        left, right = (torch.randn(5, tokens, side, generator=generator) for side in (k, j))
        expected = torch.einsum("btk,btj->bkj", left.double(), right.double()).square().sum((1, 2))
        assert torch.allclose(squared_norms(left, right).double(), expected, rtol=1e-4)


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
    found = measure(checkpointed, layers(checkpointed), batches(DATA, 3), 9, PLAIN, quiet=True)
    assert len(runs) == 2 * 2 * 3, "each of two layers runs again in the backward pass of three batches"
    assert torch.allclose(found.gradient_norm, expected.gradient_norm, rtol=1e-5)


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
    found = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for index, row in enumerate(DATA):
        model.zero_grad()
        model(**inputs([row])).loss.backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        assert float(found.gradient_norm[index]) == pytest.approx(float(norm), rel=1e-3)


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
    found = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    _, gradients, _ = one_by_one(model.eval(), DATA)
    assert torch.allclose(found.gradient_norm, gradients.norm(dim=1), rtol=1e-4)


def test_a_sample_without_labels_teaches_nothing_and_losses_are_means_over_tokens():
    model, data = adapted().eval(), copy.deepcopy(DATA[:3])
    data[1]["labels"] = [-100] * len(data[1]["labels"])
    found = measure(model, layers(model), batches(data, 3), 3, PLAIN, quiet=True)
    assert found.loss[1] == found.gradient_norm[1] == 0
    assert (found.gradient_norm[[0, 2]] > 0).all()
    with torch.no_grad():
        assert torch.allclose(sample_losses(model, inputs(data[:1])), model(**inputs(data[:1])).loss, rtol=1e-5)


def test_what_belongs_to_no_sample_and_what_is_not_finite_are_named():
    model = adapted().eval()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"the gradient of sample \d of the training set is not finite"):
        measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a = torch.nn.Embedding(300, 4), torch.nn.Linear(4, 2)
            self.b = torch.nn.Linear(2, 300)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, attention_mask, use_cache):
            return self.b(self.a(self.embed(input_ids).flatten(0, 1)[::2]))

    routed = Routed()
    with pytest.raises(CalibrationError, match=r"expert reads .* where the batch has 4 samples .*tsq_sampling: false"):
        measure(routed, {"expert": (routed.a, routed.b)}, batches(DATA, 4), 9, PLAIN, quiet=True)
