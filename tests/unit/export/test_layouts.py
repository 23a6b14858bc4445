"""Every layout, read by its server's rule, is the original adapter; a wrong one gets no certificate and no name."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.adapter.lora import contract_arguments
from llamafactory_adaptive.export import exporter, serve_command
from llamafactory_adaptive.export.base_checkpoint import BaseCheckpoint
from llamafactory_adaptive.export.exporter import run_export
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.request import SERVERS, ExportRequest
from llamafactory_adaptive.export.source_adapter import read_adapter
from llamafactory_adaptive.export.verify.server_rules import RULES, read_as
from tests.helpers.lora import edit_config, mixed_ranks, save_adapter
from tests.helpers.tiny import TARGETS, save_tiny


LAYOUTS = ("peft", *RULES)
BY_TYPE = {"q_proj": 2, "down_proj": 6, "v_proj": 3}
ADAPTERS = {
    "ours": {},
    "one alpha": {"r": 4, "lora_alpha": 12, "target_modules": list(TARGETS), "rank_pattern": BY_TYPE},
    "alphas by hand": {
        "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "alpha_pattern": {"layers.1.mlp.down_proj": 20},
    },
    "rsLoRA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": BY_TYPE,
               "use_rslora": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, folder / name.replace(" ", "_"), **ADAPTERS[name]) for name in ADAPTERS}


@pytest.fixture(scope="module")
def updates(base, adapters):
    """What PEFT adds to each weight, by adapter."""
    by_adapter = {}
    for name, folder in adapters.items():
        live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        prefix = "base_model.model."
        by_adapter[name] = {
            module_name.removeprefix(prefix): module.get_delta_weight("default").detach()
            for module_name, module in live.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    return by_adapter


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("server", LAYOUTS)
def test_the_server_reads_what_peft_reads(server, name, adapters, updates, tmp_path):
    said = run_export(ExportRequest(adapters[name], server, tmp_path / "out"))
    assert "parity    passed" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    served_updates = read_as("vllm" if server == "peft" else server, tmp_path / "out")
    assert set(updates[name]) <= set(served_updates)
    for module, (a, b, scale) in served_updates.items():
        expected = updates[name].get(module, torch.zeros(b.shape[0], a.shape[1]))
        torch.testing.assert_close(scale * b @ a, expected, rtol=1e-5, atol=1e-6)


def test_our_own_adapters_keep_their_tensors(adapters, tmp_path):
    run_export(ExportRequest(adapters["ours"], "vllm-legacy", tmp_path / "out"))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapters["ours"], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == max(config["rank_pattern"].values())
    assert {config["alpha_pattern"][k] / r for k, r in config["rank_pattern"].items()} == {2.0}
    assert config["lora_alpha"] / config["r"] == 2.0


def test_scales_that_differ_by_a_rounding_are_one(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = save_adapter(base, tmp_path / "a", **contract_arguments(mixed_ranks(model), 1 / 3 + 0.1))
    assert len({module.scale for module in read_adapter(adapter).modules}) > 1
    run_export(ExportRequest(adapter, "vllm-legacy", tmp_path / "out"))
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("server", ["sglang", "llamacpp"])
def test_padded_layouts_have_one_rank_in_every_layer_of_a_type(server, adapters, tmp_path):
    run_export(ExportRequest(adapters["ours"], server, tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {8}
    assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k} == {8}
    assert len(tensors) == 2 * 2 * len(TARGETS)  # two layers, modules without an adapter filled with zeros


def test_sixteen_bit_factors_stay_as_they_are(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "half", torch.bfloat16)
    run_export(ExportRequest(adapter, "llamacpp", tmp_path / "out"))
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(("server", "name"), [("vllm-legacy", "alphas by hand"), ("llamacpp", "ours")])
def test_files_copied_as_they_are_would_be_misread(server, name, adapters, tmp_path):
    """The reason for this command."""
    export = exporter.prepare(ExportRequest(adapters[name], server, tmp_path / "out"))
    with pytest.raises(ExportError, match=r"parity failed.*\n  modules   FAILED  largest difference"):
        exporter.certify(export, export.adapter.folder)


def wrong_scale(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    edit_config(
        folder, lora_alpha=config["lora_alpha"] * 1.02,
        alpha_pattern={key: value * 1.02 for key, value in config["alpha_pattern"].items()},
    )  # fmt: skip


@pytest.mark.parametrize("server", LAYOUTS)
def test_a_planted_wrong_scale_fails_and_leaves_nothing(server, adapters, tmp_path, monkeypatch):
    honest = exporter.write

    def tampered(export, target):
        notes = honest(export, target)
        wrong_scale(target)
        return notes

    monkeypatch.setattr(exporter, "write", tampered)
    with pytest.raises(ExportError, match=r"parity failed, nothing was written to .*out:\n  modules   FAILED"):
        run_export(ExportRequest(adapters["ours"], server, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_certificate_says_what_was_compared(adapters, base, tmp_path):
    run_export(ExportRequest(adapters["ours"], "vllm", tmp_path / "out", tolerance=1e-4))
    document = json.loads((tmp_path / "out" / "parity_certificate.json").read_text())
    assert document["passed"] is True
    assert document["base"] == str(base)
    assert document["ranks"] == [1, 8]
    assert document["adapter_effect"] > 0.1  # what a wrong scale would have to hide in
    modules, check = document["checks"]
    assert (modules["name"], modules["unit"], modules["passed"]) == ("modules", "relative", True)
    assert (check["name"], check["tolerance"], check["passed"]) == ("parity", 1e-4, True)
    assert check["max_difference"] <= 1e-4
    assert len(document["prompts"]) == 8
    for prompt in document["prompts"]:
        following = prompt["next"]
        assert len(following["tokens"]) == len(following["peft"]) == len(following["exported"]) == 20
        assert following["peft"] == sorted(following["peft"], reverse=True)
    assert set(document["export_files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(document["adapter_files"]["adapter_model.safetensors"]) == 64
    assert {"torch", "peft", "transformers"} <= set(document["versions"])


def test_an_adapter_without_effect_is_told(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in load_file(path).items()}, path)
    said = run_export(ExportRequest(adapter, "vllm", tmp_path / "out"))
    assert (
        "warning: the adapter moves log-probabilities by 0.00e+00 at most, less than the tolerance of parity" in said
    )


READER_FAULTS = [
    ("vllm", {"rank_pattern": {}}, "vLLM expects rank 8 for .* and finds"),
    ("vllm-legacy", {"r": 2}, "vLLM has buffers of rank 2 for .* of rank"),
    ("sglang", {}, "SGLang has buffers of rank 8 for .* of rank"),
]


@pytest.mark.parametrize(("server", "damage", "message"), READER_FAULTS)
def test_what_a_server_would_refuse_fails(server, damage, message, adapters, base, tmp_path):
    folder = edit_config(save_adapter(base, tmp_path / "copy"), **damage)
    with pytest.raises(ExportError, match=message):
        read_as(server, folder)


def test_sglang_stacks_projections(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ExportError, match=r"SGLang stacks q_proj, k_proj, v_proj: .* has [qv]_proj but no k_proj"):
        read_as("sglang", adapter)
    run_export(ExportRequest(adapter, "sglang", tmp_path / "out"))  # the layout brings the missing one as zeros
    assert "k_proj" in json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (33, 64), (129, 256), (257, 320), (512, 512)])
def test_max_lora_rank_is_rounded_up_to_what_vllm_allows(rank, allowed):
    assert serve_command.max_lora_rank(rank) == allowed
    base = BaseCheckpoint("some/base", Path("cache"), {})
    assert f"--max-lora-rank {allowed} " in serve_command.serve_command("vllm", base, Path("out"), rank)


@pytest.mark.parametrize("server", SERVERS)
def test_servers_listen_on_this_machine_only_and_paths_are_quoted(server):
    base = BaseCheckpoint("my base", Path("my base"), {})
    words = shlex.split(serve_command.serve_command(server, base, Path("some where") / "out", 8))
    assert "127.0.0.1" in " ".join(words)
    assert any(word.endswith("some where/out") for word in words)
    assert "my base" in words or server == "merged"


def test_ranks_beyond_vllm_are_refused():
    with pytest.raises(ExportError, match=r"ranks up to 512 and this adapter has 513; use --for merged"):
        serve_command.max_lora_rank(513)
