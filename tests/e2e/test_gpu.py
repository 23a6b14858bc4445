"""The same on a CUDA device: run with ``pytest -m gpu`` on a machine that has one; skipped elsewhere."""

import os
from pathlib import Path

import pytest
import yaml

from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.commands import BIN, run
from tests.helpers.tiny import pruning_settings, settings


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no CUDA device"),
]
VISIBLE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES") or "0"}


@pytest.mark.parametrize("more", [{"bf16": True}, {"fp16": True}, {"bf16": True, "quantization_bit": 4}],
                         ids=["bf16", "fp16", "4bit"])  # fmt: skip
@pytest.mark.parametrize("method", ["sensitivity", "igu", "adalora"])
def test_methods_train_on_a_gpu(method, more, tiny_llama, data_dir, tmp_path):
    make = settings if method == "sensitivity" else pruning_settings
    args = make(tiny_llama, data_dir, tmp_path / "out", adaptive_method=method, use_cpu=False, **more)
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(args))
    run(BIN / "llamafactory-cli", "train", path, **VISIBLE)
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    assert plan.budget()["left_parameters"] >= 0
    assert len(set(plan.ranks().values())) > 1
