"""Cuts of adapters, against dense decompositions and PEFT; what cannot be cut is refused, and nothing is written."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_adaptive import cli
from llamafactory_adaptive.adapter.verify import check_saved
from llamafactory_adaptive.calibration.factored_svd import decompose, singular_values
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.shrink import shrinker
from llamafactory_adaptive.export.shrink.request import ShrinkRequest, share_argument
from llamafactory_adaptive.export.shrink.shrinker import run_shrink
from llamafactory_adaptive.export.source_adapter import read_adapter
from llamafactory_adaptive.export.verify.server_rules import read_as
from llamafactory_adaptive.ranks.module_groups import packed_groups
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.lora import change_tensors, edit_config, save_adapter, saved_parameters
from tests.helpers.tiny import TARGETS


BY_TYPE = {"q_proj": 2, "down_proj": 6, "v_proj": 3}
ADAPTERS = {
    "ours": {},
    "uniform": {"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)},
    "alphas by hand": {
        "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "rank_pattern": BY_TYPE,
        "alpha_pattern": {"layers.1.mlp.down_proj": 20, "q_proj": 1},
    },
    "rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": BY_TYPE,
               "use_rslora": True},
    "wider than the layers": {"r": 24, "lora_alpha": 24, "target_modules": ["k_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, folder / name.replace(" ", "_"), **ADAPTERS[name]) for name in ADAPTERS}


def updates_in_peft(base, folder):
    """What PEFT adds to each weight, dense and in fp64."""
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in live.named_modules()
        if hasattr(module, "get_delta_weight")
    }


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(12, 20, 5), (20, 12, 5), (7, 9, 9), (6, 9, 8), (9, 9, 1)])
def test_a_decomposition_from_factors_is_the_dense_one(outputs, inputs, rank):
    torch.manual_seed(rank)
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    dense = 0.7 * b.double() @ a.double()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    found = decompose(a, b, 0.7)
    count = len(found.values)
    assert count == min(rank, inputs, outputs)
    torch.testing.assert_close(found.values, values[:count], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.tensor(singular_values(a, b, 0.7)).double(), values[:count].float().double())
    for kept in range(1, count + 1):
        new_a, new_b = found.factors(kept, 3.0)
        best = left[:, :kept] * values[:kept] @ right[:kept]
        torch.testing.assert_close(3.0 * new_b @ new_a, best, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(new_a.norm(dim=1), new_b.norm(dim=0), rtol=1e-9, atol=1e-9)


def test_directions_that_are_zero_count_as_zero():
    a = torch.randn(4, 30)
    b = torch.randn(20, 4) @ torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert [value > 0 for value in singular_values(a, b, 2.0)] == [True, True, False, False]
    assert singular_values(a, torch.zeros(20, 4), 2.0) == [0.0] * 4


# -- whole cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_cut_is_the_dense_truncation_of_every_module(name, base, adapters, tmp_path):
    source = read_adapter(adapters[name])
    costs = {module.name: module.in_features + module.out_features for module in source.modules}
    budget = sum(costs.values()) * 2
    run_shrink(ShrinkRequest(adapters[name], tmp_path / "out", rank=2))
    before, plan = updates_in_peft(base, adapters[name]), load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    after = updates_in_peft(base, tmp_path / "out")
    assert plan.ranks().keys() == before.keys() == after.keys()
    assert saved_parameters(tmp_path / "out") == plan.budget()["used_parameters"] <= budget
    for module, dense in before.items():
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        rank = plan.ranks()[module]
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert (after[module] - best).norm() <= 1e-5 * best.norm()
        for server in ("vllm", "vllm-legacy"):
            a, b, scale = read_as(server, tmp_path / "out")[module]
            assert (scale * b @ a - best).norm() <= 1e-5 * best.norm()
    assert plan.ranks() == greedy_ranks(before, costs, budget)


def greedy_ranks(updates, costs, budget):
    """Ranks by the dense singular values: one for each module, then the best per parameter that still fit."""
    ranks, left = dict.fromkeys(updates, 1), budget - sum(costs.values())
    others = [(float(value) ** 2 / costs[name], name) for name, dense in updates.items()
              for value in torch.linalg.svdvals(dense)[1:] if value > 1e-6]  # fmt: skip
    for _, name in sorted(others, reverse=True):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


@pytest.mark.parametrize("name", ADAPTERS)
def test_cut_to_its_own_size_an_adapter_answers_as_before(name, base, adapters, tmp_path):
    whole = sum(m.rank * (m.in_features + m.out_features) for m in read_adapter(adapters[name]).modules)
    run_shrink(ShrinkRequest(adapters[name], tmp_path / "out", parameters=whole))
    ids = torch.arange(24).reshape(2, 12)
    logits = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()(ids).logits
        for folder in (adapters[name], tmp_path / "out")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_a_cut_keeps_the_contract_and_names_all_in_its_certificate(adapters, tmp_path):
    said = run_shrink(ShrinkRequest(adapters["alphas by hand"], tmp_path / "out", energy=0.9))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    document = json.loads((tmp_path / "out" / "shrink_certificate.json").read_text())
    assert check_saved(tmp_path / "out", plan) == 0
    assert config["r"] == max(config["rank_pattern"].values())
    assert {config["alpha_pattern"][key] / rank for key, rank in config["rank_pattern"].items()} == {2.0}
    assert config["lora_alpha"] / config["r"] == plan.scale == 2.0
    assert config["use_rslora"] is False
    assert (plan.method, plan.options) == ("shrink", {"energy": 0.9})
    assert document["passed"] is True
    assert document["asked"] == {"energy": 0.9}
    assert 0.9 <= document["kept_energy"] < 1
    assert document["parameters"] == document["parameters_allowed"] == saved_parameters(tmp_path / "out")
    assert f"{document['parameters']:,} of {document['parameters_before']:,} parameters" in said
    assert [check["name"] for check in document["checks"]] == ["modules", "distance"]
    assert all(row["relative_error"] < 1e-6 and row["excess_distance"] < 1e-6 for row in document["modules"])
    assert {"adapter_model.safetensors", "adaptive_rank_plan.json"} <= set(document["cut_files"])
    assert "adapter_config.json" in document["adapter_files"]


def packed(plan):
    names = list(plan.ranks())
    return [[names[index] for index in group] for group in packed_groups(names)]


def test_lowest_rank_zero_lets_modules_lose_their_adapter(adapters, tmp_path):
    run_shrink(ShrinkRequest(adapters["ours"], tmp_path / "out", parameters=400, min_rank=0))
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    document = json.loads((tmp_path / "out" / "shrink_certificate.json").read_text())
    assert check_saved(tmp_path / "out", plan) == 0
    without = {name for name, rank in plan.ranks().items() if rank == 0}
    assert without
    assert set(document["dropped_modules"]) == without
    assert all(len({name in without for name in group}) == 1 for group in packed(plan)), "servers keep groups whole"
    assert not without & set(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"])


def test_half_precision_factors_are_cut_in_fp32(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "half", torch.bfloat16, r=4, target_modules=["q_proj"])
    run_shrink(ShrinkRequest(adapter, tmp_path / "out", rank=1))
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


def test_facts_of_the_base_are_told_on(adapters, tmp_path):
    run_shrink(ShrinkRequest(adapters["uniform"], tmp_path / "first", rank=4))
    plan = load_plan(tmp_path / "first" / "adaptive_rank_plan.json")
    replace(plan, provenance={**plan.provenance, "quantization_bit": 4, "seed": 1}).write(
        tmp_path / "first" / "adaptive_rank_plan.json"
    )
    run_shrink(ShrinkRequest(tmp_path / "first", tmp_path / "second", rank=2))
    told = load_plan(tmp_path / "second" / "adaptive_rank_plan.json").provenance
    assert told["quantization_bit"] == 4
    assert "seed" not in told


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.01, -1.0])
def test_a_cut_that_is_not_the_best_gets_no_certificate_and_no_name(factor, adapters, tmp_path, monkeypatch):
    honest = shrinker.write_cut

    def tampered(found, cut, target):
        honest(found, cut, target)
        key = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
        change_tensors(target, lambda t: t.update({key: t[key] * factor}))

    monkeypatch.setattr(shrinker, "write_cut", tampered)
    with pytest.raises(ExportError, match=r"not the best of its ranks, nothing was written:\n  modules   FAILED"):
        run_shrink(ShrinkRequest(adapters["uniform"], tmp_path / "out", rank=2))
    assert list(tmp_path.iterdir()) == []


def refusal(tmp_path, adapter, **budget):
    with pytest.raises(AdaptiveConfigError) as caught:
        run_shrink(ShrinkRequest(adapter, tmp_path / "out", **(budget or {"rank": 2})))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is invalid: only LORA adapters"),
    ({"use_dora": True}, "use_dora: True is invalid: DoRA normalises whole columns"),
    ({"bias": "all"}, "bias: 'all' is invalid: trained biases"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] is invalid: fully trained weights have no rank"),
    ({"rank_pattern": {"(a*)*": 4}}, "rank_pattern: '(a*)*' is invalid: a key must be the name of a module"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(change) for change, _ in CONFIGS])
def test_adapters_that_are_no_plain_lora(change, message, adapter, tmp_path):
    assert message in refusal(tmp_path, edit_config(adapter, **change))


def change_all(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file({key: change(key, tensor) for key, tensor in load_file(path).items()}, path)
    return adapter


def test_factors_that_are_not_finite_or_without_effect(adapter, tmp_path):
    change_all(adapter, lambda key, t: t * 0 if "lora_B" in key else t)
    assert "all its updates are zero" in refusal(tmp_path, adapter)
    change_all(adapter, lambda key, t: t * float("nan"))
    assert "holds NaN or infinity" in refusal(tmp_path, adapter)
    change_all(adapter, lambda key, t: t)
    (adapter / "adapter_model.safetensors").unlink()
    assert "it has no weights as safetensors" in refusal(tmp_path, adapter)


BUDGETS = [
    ({"rank": 9}, "rank: 9 is invalid: it costs 9,216 parameters, and the adapter has 8,192; try --rank 8"),
    ({"parameters": 8193}, "parameters: 8193 is invalid: it costs 8,193 parameters, and the adapter has 8,192"),
    ({"parameters": 1023}, "it allows 1,023 parameters, and rank 1 in every module costs 1,024; try --parameters"),
    ({"parameters": 10, "min_rank": 0}, "and the least that can be kept has 64; try --parameters 64"),
]


@pytest.mark.parametrize(("budget", "message"), BUDGETS, ids=[str(budget) for budget, _ in BUDGETS])
def test_budgets_that_the_adapter_does_not_allow(budget, message, adapters, tmp_path):
    assert message in refusal(tmp_path, adapters["uniform"], **budget)


def test_an_output_folder_that_exists_is_left_alone(adapters, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert cli.main(["shrink", str(adapters["uniform"]), "--rank", "2", "--out", str(tmp_path / "out")]) == 2
    assert "out: " in (said := capsys.readouterr().err)
    assert "it exists already, nothing was overwritten; try another folder" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


OPTIONS = [
    (["--rank", "0"], "rank: 0 is invalid: must be a whole number of at least 1; try --rank 8"),
    (["--parameters", "-1"], "parameters: -1 is invalid: must be a whole number of at least 1; try --parameters 1"),
    (["--energy", "110%"], "energy: 1.1 is invalid: must be a share above 0 and at most 1"),
    (["--energy", "nan"], "energy: nan is invalid: must be a share above 0 and at most 1"),
    (["--rank", "2", "--min-rank", "-1"], "min_rank: -1 is invalid: must be a whole number of at least 0"),
    (["--rank", "2", "--data", "d", "--config", "x.yaml"], "data: 'd' is invalid: losses are taken for a curve over"),
    (["--curve", "--data", "d"], "data: 'd' is invalid: a data set is read as a YAML says"),
    (["--curve", "--config", "x.yaml"], "config: 'x.yaml' is invalid: it is about a held-out loss; try --data NAME"),
    (["--curve", "seed=1"], "key=value: 'seed=1' is invalid: it replaces a setting of the YAML that a held-out"),
    (["--curve", "--within", "1%"], "within: 0.01 is invalid: it is about a held-out loss; try --data NAME with it"),
    (["--curve", "--data", "d", "--config", "x", "--within", "-1"], "within: -1.0 is invalid: must be a share of the"),
    (["--curve", "--data", "d", "--config", "x", "--samples", "0"], "samples: 0 is invalid: must be a whole number"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[" ".join(words) for words, _ in OPTIONS])
def test_options_that_are_wrong_or_do_not_fit_together(words, message, tmp_path, capsys):
    assert cli.main(["shrink", "saves/none", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_one_budget_is_asked_for(capsys):
    for words in (["--rank", "2", "--energy", "0.9"], [], ["--energy", "much"]):
        with pytest.raises(SystemExit):
            cli.main(["shrink", "saves/none", *words, "--out", "x"])
    assert "'much' is no share; write 0.95 or 95%" in capsys.readouterr().err
    assert share_argument("95%") == share_argument("0.95") == 0.95
