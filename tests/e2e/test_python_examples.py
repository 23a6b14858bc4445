"""The scripts of examples/python, in processes of their own where LLaMA-Factory cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import PeftModel

from llamafactory_adaptive.adapter.lora import live_layers
from tests.helpers.lora import saved_parameters
from tests.helpers.tiny import save_tiny, tiny_model


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "python"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tiny checkpoint, rows, and a folder that makes llamafactory unimportable when it is on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("scripts")
    words = ("red", "blue", "one", "two", "sun", "sea")
    texts = [" ".join(words[(3 * i + j) % 6] for j in range(2 + i % 4)) for i in range(24)]
    lines = [json.dumps({"prompt": text, "completion": f" {text[::-1]}"}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    shim = folder / "shim" / "llamafactory"
    shim.mkdir(parents=True)
    (shim / "__init__.py").write_text("raise ImportError('llamafactory is not here')\n")
    return SimpleNamespace(model=save_tiny(folder / "model"), rows=folder / "rows.jsonl", shim=shim.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more"),
    [
        pytest.param("static_sft.py", ["--steps", "4"], marks=pytest.mark.repeats),
        ("igu_trainer.py", ["--steps", "12", "--interval", "2"]),
    ],
)
def test_examples_train_what_they_print(script, more, scene, tmp_path):
    if script == "static_sft.py":
        pytest.importorskip("trl")
    words = [EXAMPLES / script, scene.model, scene.rows, tmp_path / "out", "--rank", "4", *more]
    environment = {**os.environ, "PYTHONPATH": str(scene.shim), "LLAMAFACTORY_ADAPTIVE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{saved_parameters(tmp_path / 'out'):,} of 4,096 (uniform LoRA of rank 4)" in done.stdout
    assert "0 of 14 modules untrained" in done.stdout
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    assert all(bool(layer.lora_B[adapter].weight.any()) for layer, adapter in live_layers(plain).values())
