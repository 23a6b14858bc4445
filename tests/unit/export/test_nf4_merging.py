"""A quantisation-aware merge is PEFT's on the dequantised base, and its report tells the error against the update."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llamafactory_adaptive.export.exporter import run_export
from llamafactory_adaptive.export.nf4_merging import Nf4, QuantisationReport
from llamafactory_adaptive.export.request import ExportRequest
from llamafactory_adaptive.export.source_adapter import read_adapter
from tests.helpers.exports import save_base, weights
from tests.helpers.lora import save_adapter


@pytest.mark.parametrize("double", [True, False])
def test_quantisation_aware_merge_is_peft_on_the_dequantised_base(double, tmp_path):
    base = save_base(tmp_path / "base", shard="20KB", num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "adapter")
    said = run_export(
        ExportRequest(adapter, "merged", tmp_path / "out", quantization_aware=True, double_quantization=double)
    )
    loading = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", quantization_config=loading, device_map={"": "cpu"}
    )
    expected = PeftModel.from_pretrained(model.dequantize(), adapter).merge_and_unload().state_dict()
    merged = weights(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    changed = {name for name, tensor in weights(base).items() if not torch.equal(merged[name], tensor)}
    assert len(changed) == 7  # every linear layer, adapted or not; neither head, embeddings nor norms
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["nf4"] == {"double": double}
    assert f"median {report['median']:.3f}" in said


def test_the_ratio_is_quantisation_error_over_update(tmp_path):
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    folder = save_adapter(base, tmp_path / "adapter")
    factors = load_file(folder / "adapter_model.safetensors")
    untrained = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    save_file({**factors, untrained: factors[untrained] * 0}, folder / "adapter_model.safetensors")
    report, name = QuantisationReport(Nf4(True)), "model.layers.0.self_attn.q_proj"
    prepare = report.transform(read_adapter(folder), {f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk"})
    weight = weights(base)[f"{name}.weight"]
    seen = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert torch.equal(prepare(f"{name}.weight", weight), seen)
    prepare("model.layers.0.self_attn.k_proj.weight", weights(base)["model.layers.0.self_attn.k_proj.weight"])
    assert prepare("model.norm.weight", weight) is weight
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    error, learned = (seen.double() - weight.double()).norm(), (2.0 * b @ a).norm()
    assert report.ratios == {name: pytest.approx(float(error / learned), rel=1e-4)}
    assert report.untrained == ["model.layers.0.self_attn.k_proj"]  # an update of zero has no ratio


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.1, "prefer a plain merge"), (0.5, "score this merge"), (3.0, "weights that training saw")]
)
def test_the_recommendation_follows_the_median(ratio, words):
    report = QuantisationReport(Nf4(True), {"a": ratio, "b": ratio, "c": 100.0})
    assert words in report.recommendation()
    assert report.table().splitlines()[1].startswith("c")
