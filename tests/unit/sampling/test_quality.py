"""Per-sample gradients from whole batches against one backward pass per sample."""

import copy

import pytest
import torch

from llamafactory_adaptive.calibration.weight_gradients import squared_norms
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.sampling.quality import measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec, sample_losses
from tests.helpers.samples import DATA, EXACT, PLAIN, STEP, adapted, batches, inputs, layers, one_by_one
from tests.helpers.tiny import ARCHITECTURES


@pytest.mark.parametrize("trained", [True, False], ids=["", "new adapter"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_terms_are_those_of_one_backward_pass_per_sample(architecture, trained):
    model = adapted(architecture, trained).eval()
    losses, gradients, afters = one_by_one(model, DATA)
    mean = gradients.mean(0)
    terms = measure(model, layers(model), batches(DATA, 4), 9, EXACT, quiet=True)
    assert torch.allclose(terms.loss, losses, rtol=1e-5)
    assert torch.allclose(terms.gradient_norm, gradients.norm(dim=1), rtol=1e-4)
    assert torch.allclose(terms.alignment, gradients @ mean / mean.norm(), rtol=1e-4, atol=1e-6 * float(mean.norm()))
    assert torch.allclose(terms.loss_drop, losses - afters, rtol=1e-3, atol=3e-6)
    first_order = measure(model, layers(model), batches(DATA, 4), 9, PLAIN, quiet=True)
    assert torch.allclose(first_order.loss_drop, STEP * gradients.square().sum(1), rtol=1e-4)
    assert (first_order.alignment == 0).all()


def test_batches_and_padding_do_not_matter():
    model = adapted().eval()
    expected = measure(model, layers(model), batches(DATA, 1), 9, EXACT, quiet=True)  # no padding at all
    for size, pad_id in ((4, 0), (9, 7), (9, 200)):
        terms = measure(model, layers(model), batches(DATA, size, pad_id), 9, EXACT, quiet=True)
        for name, values in vars(expected).items():
            tolerance = {"rtol": 1e-4, "atol": 3e-6 if name == "loss_drop" else 1e-7}
            assert torch.allclose(getattr(terms, name), values, **tolerance), name


def of_two_processes(model, all_batches, spec):
    """Each scores every other batch, in a thread of its own; sums over processes are taken where both have arrived."""
    import threading

    barrier, slots, by_rank = threading.Barrier(2), {}, {}

    def work(rank):
        def all_reduce_sum(tensor):
            slots[rank] = tensor.clone()
            barrier.wait(60)
            total = slots[0] + slots[1]
            barrier.wait(60)
            return tensor.copy_(total)

        own = copy.deepcopy(model)
        by_rank[rank] = measure(own, layers(own), all_batches[rank::2], 9, spec, all_reduce_sum, quiet=True)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return by_rank[0], by_rank[1]


@pytest.mark.parametrize("spec", [PLAIN, EXACT, TermSpec(STEP, False, "projected", 64, 3),
                                  TermSpec(STEP, True, "exact", 64, 3, clusters=3)],
                         ids=["", "exact", "projected", "clusters"])  # fmt: skip
def test_two_processes_find_what_one_does(spec):
    model = adapted().eval()
    all_batches = batches(DATA, 2)
    expected = measure(model, layers(model), all_batches, 9, spec, quiet=True)
    for terms in of_two_processes(model, all_batches, spec):
        for name, values in vars(expected).items():
            if name == "alignment":  # the mean gradient is summed in another order
                assert torch.allclose(terms.alignment, values, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(getattr(terms, name), values), name


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
        terms = measure(
            model, layers(model), batches(DATA, 9), 9, TermSpec(STEP, False, "projected", 2048, seed), quiet=True
        )
        mean = terms.alignment.mean()  # |mean p|: the mean of <p_i, mean p> / |mean p|
        estimates.append(terms.alignment * mean)
    exact = gradients @ gradients.mean(0)
    average = torch.stack(estimates).mean(0)
    spread = torch.stack(estimates).std(0) / 40**0.5
    # <p_i, mean p> is unbiased but for the term of i with itself, which is unbiased as well.
    assert ((average - exact).abs() < 4 * spread + 1e-9).all()
    assert float(torch.corrcoef(torch.stack([estimates[0], exact]))[0, 1]) > 0.95


def test_clusters_are_kinds_of_gradients_and_change_nothing_else():
    """Copies of three rows: each row's copies have one gradient, whatever they are padded with."""
    model, data = adapted().eval(), [DATA[index] for index in (0, 4, 8, 4, 0, 4, 8, 0, 4)]
    plain = measure(model, layers(model), batches(data, 4), 9, EXACT, quiet=True)
    found = measure(model, layers(model), batches(data, 4), 9, TermSpec(STEP, True, "exact", 128, 0, 3), quiet=True)
    assert plain.clusters is None
    assert found.clusters.tolist() == [1, 0, 2, 0, 1, 0, 2, 1, 0]
    assert all(torch.equal(values, plain.measured[name]) for name, values in found.measured.items())


def test_both_ways_of_the_ghost_norm_agree():
    generator = torch.Generator().manual_seed(0)
    for tokens, k, j in ((3, 40, 30), (50, 8, 4)):
        left, right = (torch.randn(5, tokens, side, generator=generator) for side in (k, j))
        expected = torch.einsum("btk,btj->bkj", left.double(), right.double()).square().sum((1, 2))
        assert torch.allclose(squared_norms(left, right).double(), expected, rtol=1e-4)


def test_a_sample_without_labels_teaches_nothing_and_losses_are_means_over_tokens():
    model, data = adapted().eval(), copy.deepcopy(DATA[:3])
    data[1]["labels"] = [-100] * len(data[1]["labels"])
    terms = measure(model, layers(model), batches(data, 3), 3, PLAIN, quiet=True)
    assert terms.loss[1] == terms.gradient_norm[1] == 0
    assert (terms.gradient_norm[[0, 2]] > 0).all()
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
