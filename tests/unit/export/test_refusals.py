"""What cannot be exported is refused before any model is loaded, in one message; vLLM's part fails in words, too."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive import cli
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.export import exporter
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.request import ExportRequest
from llamafactory_adaptive.export.verify import compare, vllm_check
from llamafactory_adaptive.export.verify.certificate import Check
from llamafactory_adaptive.export.verify.compare import Comparer
from llamafactory_adaptive.export.verify.log_probabilities import TOP_K, log_probabilities, tokenise
from llamafactory_adaptive.export.verify.vllm_check import VllmAnswer
from tests.helpers.exports import refusal
from tests.helpers.lora import change_tensors, edit_config, save_adapter
from tests.helpers.processes import wait_until_ended
from tests.helpers.tiny import save_tiny


pytestmark = pytest.mark.usefixtures("no_model_is_loaded")
CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is invalid: only LORA adapters"),
    ({"peft_type": None}, "peft_type: None is invalid"),
    ({"use_dora": True}, "use_dora: True is invalid: DoRA normalises whole columns"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: {'nblocks': 2} is invalid: BD-LoRA's factors are blocks"),
    ({"kasa_config": {"beta": 1}}, "between its factors; try plain LoRA, or merging it with the version of PEFT that"),
    ({"use_nextlora": True}, "use_nextlora: True is invalid: a variant of LoRA that is not known here"),
    ({"next_config": {"a": 1}}, "next_config: {'a': 1} is invalid: a variant of LoRA that is not known here"),
    ({"bias": "all"}, "bias: 'all' is invalid: trained biases"),
    ({"lora_bias": True}, "lora_bias: True is invalid"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: True is invalid: the base stores its weights transposed"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' is invalid: PEFT changes the base weights"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] is invalid: peft reads LoRA factors only"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices: [1] is invalid: trained tokens are no LoRA"),
    ({"target_parameters": ["x"]}, "target_parameters: ['x'] is invalid: adapters on bare parameters"),
    ({"r": None}, "r: None is invalid: ranks are whole numbers from 1 on"),
    ({"rank_pattern": {"q_proj": 0}}, "q_proj: 0 is invalid: ranks are whole numbers from 1 on"),
    ({"alpha_pattern": {"q_proj": "8"}}, "q_proj: '8' is invalid: ranks are whole numbers from 1 on, alphas"),
    ({"rank_pattern": {}}, "has rank 8 by adapter_config.json but A (1, 32) and B (64, 1)"),
    ({"base_model_name_or_path": None}, "base: None is invalid: the adapter's config names no base model"),
    ({"base_model_name_or_path": "/gone/away"}, "base: '/gone/away' is invalid: it is no folder here and cannot"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(change) for change, _ in CONFIGS])
def test_configs_no_layout_can_carry(change, message, adapter, tmp_path):
    assert message in refusal(edit_config(adapter, **change), tmp_path)


def test_all_reasons_come_at_once(adapter, tmp_path):
    edit_config(adapter, use_dora=True, bias="all")
    (adapter / "adaptive_state.json").write_text("{}")
    (adapter / "value_head.safetensors").touch()
    message = refusal(adapter, tmp_path)
    assert message.startswith("4 problems in the configuration:")
    assert "it is a checkpoint of an unfinished run; try the output_dir of the finished run" in message
    assert "the value head of a reward model would be lost" in message


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = [
    (lambda t: t.update({KEY: t[KEY] * float("nan")}), "layers.0.self_attn.q_proj holds NaN or infinity"),
    (lambda t: t.pop(KEY), "lora_B.weight is no factor of a linear LoRA layer"),
    (lambda t: t.update(other=torch.ones(1)), "the tensor other is no factor of a linear LoRA layer"),
    (lambda t: t.clear(), "it holds no LoRA factors"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_tensors_that_are_no_lora(change, message, adapter, tmp_path):
    change_tensors(adapter, change)
    assert message in refusal(adapter, tmp_path)


def test_folders_without_an_adapter(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    assert "it cannot be read" in refusal(adapter, tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.safetensors is missing: it has no weights as safetensors" in refusal(adapter, tmp_path)
    assert "adapter_config.json is missing: there is no adapter in it" in refusal(tmp_path / "nowhere", tmp_path)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("[")
    assert "adapter_config.json is not valid JSON" in refusal(adapter, tmp_path)


def test_a_full_disk_is_found_before(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refusal(adapter, tmp_path, "merged")
    assert "the merged weights take 0.0 GB and 0.0 GB are free there; try a folder on another disk" in message


def test_a_place_that_takes_no_folder(adapter, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"nothing can be written to .*file: Not a directory"):
        exporter.run_export(ExportRequest(adapter, "peft", tmp_path / "file" / "out"))


def test_an_existing_folder_is_left_alone(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(AdaptiveConfigError, match="it exists already, nothing was overwritten; try another folder"):
        exporter.run_export(ExportRequest(adapter, "peft", tmp_path / "out"))
    assert (tmp_path / "out" / "mine").read_text() == "precious"


WORDS = [
    (["--for", "vllm", "--dtype", "float16"], "dtype: 'float16' is invalid: only merged weights have a type"),
    (["--for", "vllm", "--quantization-aware"], "quantization_aware: True is invalid"),
    (["--for", "merged", "--no-double-quantization"], "double_quantization: False is invalid: it says how"),
    (["--for", "sglang", "--vllm-python", "x"], "vLLM cannot check what is laid out for sglang"),
    (["--for", "peft", "--tolerance", "0"], "tolerance: 0.0 is invalid: must be a positive number"),
    (["--for", "peft", "--tolerance", "nan"], "tolerance: nan is invalid"),
    (["--for", "peft", "--out", "."], "out: '.' is invalid: it names no new folder; try --out served/a"),
    (["--for", "peft", "--out", ""], "out: '.' is invalid"),
    (["--for", "peft", "--out", "x/.."], "out: 'x/..' is invalid"),
    (["--for", "peft", "--out", "/"], "out: '/' is invalid"),
]


@pytest.mark.parametrize(("words", "message"), WORDS)
def test_options_that_say_nothing_are_user_errors(words, message, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_pythons_without_vllm(adapter, tmp_path):
    message = refusal(adapter, tmp_path, "vllm", vllm_python=tmp_path / "no_python")
    assert "no_python' is invalid: it cannot be run (No such file or directory)" in message
    assert "it has no vLLM that can be imported (ModuleNotFoundError: No module named 'vllm'); try" in refusal(
        adapter, tmp_path, "vllm", vllm_python=Path(sys.executable)
    )


def fake_python(folder, body):
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


VERSIONS = [
    ("vllm-legacy", "0.32.0", "its vLLM 0.32.0 reads rank_pattern and alpha_pattern: an answer from it is no check of "
     "vllm-legacy; try --for vllm, the Python of another environment, or leaving it out"),
    ("vllm-legacy", "1.0.0rc1", "its vLLM 1.0.0rc1 reads rank_pattern"),
    ("vllm", "0.31.9", "its vLLM 0.31.9 does not read rank_pattern and alpha_pattern: an answer from it is no "
     "check of vllm; try --for vllm-legacy"),
    ("vllm", "dev", "its vLLM calls itself dev, which does not tell whether it reads ranks by module"),
    ("vllm-legacy", "0.31.2+cpu", ""),
    ("vllm", "0.32.1.dev3+g0a1b2c", ""),
    ("merged", "0.9.1", ""),
    ("merged", "dev", ""),
]  # fmt: skip


@pytest.mark.parametrize(("server", "version", "message"), VERSIONS)
def test_a_vllm_that_reads_another_layout_is_no_check(server, version, message, adapter, tmp_path):
    python = fake_python(tmp_path, f"print('a notice of its own')\nprint('{version}')")
    if message:
        assert message in refusal(adapter, tmp_path, server, vllm_python=python)
    else:
        exporter.prepare(ExportRequest(adapter, server, tmp_path / "out", vllm_python=python))


def test_a_vllm_that_fails_is_quoted(tmp_path):
    python = fake_python(tmp_path, "import sys; print('engine start'); print('no memory left'); sys.exit(3)")
    with pytest.raises(
        ExportError, match=r"vLLM could not serve the export \(exit code 3\): engine start \| no memory"
    ):
        vllm_check.ask_vllm(python, tmp_path, None, None, [[1]])


def test_a_vllm_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    body = "import os, time; os.fork(); open(f'{}/{{os.getpid()}}', 'w').close(); time.sleep(60)".format(
        tmp_path / "pids"
    )
    (tmp_path / "pids").mkdir()
    monkeypatch.setattr(vllm_check, "TIME_LIMIT_S", 1)
    with pytest.raises(ExportError, match="vLLM did not answer within 1 s"):
        vllm_check.ask_vllm(fake_python(tmp_path, body), tmp_path, None, None, [[1]])
    started = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(started) == 2
    wait_until_ended(started)


def test_what_vllm_leaves_running_is_ended(tmp_path):
    body = """
import os, sys, time
if child := os.fork():
    open(sys.argv[-1], "w").write('{"version": "0", "device": "cpu", "dtype": "' + str(child) +
                                  '", "exported": [], "plain": []}')
else:
    time.sleep(60)"""
    child = int(vllm_check.ask_vllm(fake_python(tmp_path, body), tmp_path, None, None, [[1]]).dtype)
    wait_until_ended([child])


def test_the_probe_is_one_process_whatever_the_user_has_set(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE")
    python = fake_python(tmp_path, f"import os, sys; print(*map(os.environ.get, {names})); sys.exit(3)")
    with pytest.raises(ExportError, match=r"0 7$"):
        vllm_check.ask_vllm(python, tmp_path, None, None, [[1]])


@pytest.mark.parametrize("position", range(3))
def test_nan_from_vllm_is_no_agreement(position):
    reference = [torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -4.0]])]
    rows = [{0: -1.0, 1: -2.0}, {0: -3.0}]
    rows[position // 2][position % 2] = float("nan")
    distance = vllm_check.difference_of_first_tokens(reference, rows)
    assert distance == float("inf")
    assert not Check("vllm", "", "", distance, 1e-3).passed
    assert not Check("vllm", "", "", 0.0, distance).passed  # a base that answers NaN in 16 bits bounds nothing


def answers(base, factor, dtype):
    """What a server would say that applies ``factor`` times the log-probabilities of PEFT's model."""

    def ask(python, model, adapter, rank, rows):
        assert (model, rank) == (Path(base), 8)
        live = compare.load_peft(compare.load(base), adapter)
        with live.disable_adapter():
            plain = [row[-1] for row in log_probabilities(live, rows)]
        served = [row[-1] * factor for row in log_probabilities(live, rows)]
        as_rows = lambda tensors: [dict(enumerate(t.tolist()[:TOP_K])) for t in tensors]  # noqa: E731
        noise = 0.0 if dtype == "float32" else 0.1
        return VllmAnswer("0.0", "cpu", dtype, as_rows(served), as_rows([t + noise for t in plain]))

    return ask


@pytest.mark.loads
@pytest.mark.parametrize(
    ("factor", "dtype", "passed"),
    [(1.0, "float32", True), (1.01, "float32", False), (1.01, "bfloat16", True), (1.2, "bfloat16", False)],
)
def test_vllm_is_held_to_fp32_or_to_how_far_its_base_is_off(factor, dtype, passed, base, adapter, monkeypatch):
    monkeypatch.setattr(compare, "ask_vllm", answers(base, factor, dtype))
    export = exporter.prepare(ExportRequest(adapter, "vllm", adapter.parent / "out"))
    comparer = Comparer(export.adapter, export.base, tokenise(base), 1e-3, Path("python"))
    check = comparer.layout("vllm", adapter).checks[-1]
    assert check.passed is passed
    assert check.tolerance == pytest.approx(1e-3 if dtype == "float32" else 0.3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.loads
@pytest.mark.skipif(
    "LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON" not in os.environ,
    reason="needs vLLM: set LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON to the python of an environment with 0.32 or newer",
)
@pytest.mark.parametrize("server", ["vllm", "merged"])
def test_in_a_real_vllm(server, tmp_path):
    base = save_tiny(tmp_path / "base", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    adapter = save_adapter(base, tmp_path / "adapter")
    python = Path(os.environ["LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON"])
    said = exporter.run_export(ExportRequest(adapter, server, tmp_path / "out", vllm_python=python))
    assert "vllm      passed" in said
    document = json.loads((tmp_path / "out" / "parity_certificate.json").read_text())
    assert document["checks"][-1]["max_difference"] < 1e-3
