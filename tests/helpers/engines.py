"""Engines of two processes: their settings, and the check that they end as one process does."""

import json
from pathlib import Path

from safetensors.torch import load_file

from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.commands import EXAMPLES
from tests.helpers.fsdp import FSDP2


HARD = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}


def engine_of(engine, folder: Path):
    """Settings and environment of an engine: a stage of ZeRO, 0 for DDP, or FSDP 2."""
    if engine == "fsdp2":
        return {}, FSDP2
    return ({"deepspeed": str(deepspeed_config(folder, engine))} if engine else {}), {}


def deepspeed_config(folder: Path, stage: int, **zero) -> Path:
    """An example configuration at another stage."""
    document = json.loads((EXAMPLES / "deepspeed" / f"ds_z{max(stage, 2)}_config.json").read_text())
    document["zero_optimization"] |= {"stage": stage, **zero}
    path = folder / f"z{stage}.json"
    path.write_text(json.dumps(document))
    return path


def check_same_end(out, alone, tolerance=1e-5):
    assert load_plan(out / "adaptive_rank_plan.json").ranks() == load_plan(alone / "adaptive_rank_plan.json").ranks()
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, alone))
    assert tensors.keys() == expected.keys()
    assert max(float((tensors[key] - expected[key]).abs().max()) for key in tensors) < tolerance


def check_same(out, alone, tolerance=1e-5):
    check_same_end(out, alone, tolerance)
    histories = [
        [line["ranks"] for line in map(json.loads, (folder / "adaptive_log.jsonl").read_text().splitlines())
         if line["event"] == "allocation"]
        for folder in (out, alone)
    ]  # fmt: skip
    assert histories[0] == histories[1], "the same at every allocation, not only in the end"
