"""The commands as users type them, each in processes of its own: launchers, engines, and life without the plugin."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llamafactory_adaptive import cli
from llamafactory_adaptive.planning.cache import CACHE_ENV
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.commands import BIN, EXAMPLES, begin, ended, run
from tests.helpers.processes import ROOT
from tests.helpers.tiny import pruning_settings, settings, unmeasured_settings
from tests.helpers.training import adapters_equal
from tests.helpers.workers import train_on_two, train_on_two_nodes


pytestmark = pytest.mark.slow


@pytest.fixture
def write(tmp_path, tiny_llama, data_dir):
    def make(name="x.yaml", **more):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings(tiny_llama, data_dir, tmp_path / "out", **more)))
        return path

    return make


def ranks(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {m.name: m.rank for m in load_plan(folder / "adaptive_rank_plan.json").active}
    return config["rank_pattern"]


def test_llamafactory_cli_trains_and_the_rest_needs_no_plugin(write, tmp_path, tiny_llama):
    run(BIN / "llamafactory-cli", "train", write(), "lora_rank=6", f"output_dir={tmp_path / 'cli'}")
    plan = load_plan(tmp_path / "cli" / "adaptive_rank_plan.json")
    assert plan.lora_rank == 6
    assert ranks(tmp_path / "cli")

    common = {"model_name_or_path": str(tiny_llama), "adapter_name_or_path": str(tmp_path / "cli"),
              "template": "default", "finetuning_type": "lora"}  # fmt: skip
    without_plugin = (
        "import sys, json\nfrom llamafactory.chat import ChatModel\n"
        "from llamafactory.train.tuner import export_model\n"
        "chat, export = map(json.loads, sys.argv[1:])\nexport_model(export)\n"
        "print('ANSWERED', len(ChatModel(chat).chat([{'role': 'user', 'content': 'red'}], max_new_tokens=4)))\n"
    )
    chat = {**common, "infer_backend": "huggingface"}
    export = {**common, "export_dir": str(tmp_path / "merged"), "infer_dtype": "float32"}
    done = run(sys.executable, "-c", without_plugin, json.dumps(chat), json.dumps(export), LLAMAFACTORY_ADAPTIVE="0")
    assert "ANSWERED 1" in done.stdout
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "merged"))
    saved = load_file(tmp_path / "cli" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    stem = f"base_model.model.{name}.lora_"
    delta = 2.0 * saved[f"{stem}B.weight"] @ saved[f"{stem}A.weight"]
    assert delta.abs().max() > 1e-4
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + delta, atol=1e-6)

    assert cli.main(["export", str(tmp_path / "cli"), "--for", "merged", "--out", str(tmp_path / "ours")]) == 0
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == merged.keys()
    assert all(torch.equal(ours[key], merged[key]) for key in ours)  # bit for bit what LLaMA-Factory's export writes


@pytest.mark.repeats
def test_launchers_agree(write, tmp_path):
    """Two processes through each launcher; one plan for all, and the same adapter from both torchrun ways."""
    two = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    run(BIN / "llamafactory-cli", "train", write(), f"output_dir={tmp_path / 'a'}", **two)
    import llamafactory.launcher as launcher

    original = Path(launcher.__file__).parent / "launcher.py"
    run(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29531", original, write(),
        f"output_dir={tmp_path / 'b'}")  # fmt: skip
    run(BIN / "llamafactory-adaptive", "train", write(), f"output_dir={tmp_path / 'c'}", **two)
    assert ranks(tmp_path / "a") == ranks(tmp_path / "b") == ranks(tmp_path / "c")
    a, b, c = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "abc")
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)


def cached_plans(nodes):
    return [len(list(node.rglob("plans/*.json"))) for node in nodes]


def test_two_nodes_without_a_shared_folder_train_rank_0s_plan(tiny_llama, data_dir, tmp_path):
    """Each has a home, a cache and an output folder of its own."""
    args = unmeasured_settings(tiny_llama, data_dir, Path("out"), save_on_each_node=True)
    nodes = train_on_two_nodes(args, tmp_path)
    assert cached_plans(nodes) == [1, 0]
    assert len(set(ranks(nodes[0] / "out").values())) > 1
    assert adapters_equal(*(node / "out" for node in nodes))


@pytest.mark.repeats
def test_two_launchers_of_two_nodes_score_once(write, tmp_path):
    config, nodes = write(save_on_each_node=True), [tmp_path / f"node{rank}" for rank in range(2)]
    started = []
    for rank, node in enumerate(nodes):
        node.mkdir()
        environment = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29551", "HOME": str(node),
                       CACHE_ENV: str(node / "cache")}  # fmt: skip
        words = [BIN / "llamafactory-cli", "train", config, f"output_dir={node / 'out'}"]
        started.append(begin(*words, **environment))
    said = [ended(process).stderr for process in started]
    assert ["scoring" in text for text in said] == [True, False]
    assert ["this node waits for it" in text for text in said] == [False, True]
    assert cached_plans(nodes) == [1, 0]
    assert adapters_equal(*(node / "out" for node in nodes))


def test_a_worker_that_is_killed_is_started_again_by_torchrun_and_finds_the_same_ranks(tiny_llama, data_dir, tmp_path):
    """Elastic launching as LLaMA-Factory has it: RDZV_ID and MAX_RESTARTS."""
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 16, "overwrite_output_dir": False}
    config, out = tmp_path / "x.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(pruning_settings(tiny_llama, data_dir, out, **more)))
    done = run(BIN / "llamafactory-cli", "train", config, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", RDZV_ID="job",
               MAX_RESTARTS="1", MASTER_PORT="29561", PYTHONPATH=f"{ROOT / 'tests/helpers/killed_worker'}:{ROOT}",
               KILL_AFTER=str(out / "checkpoint-5" / "trainer_state.json"))  # fmt: skip
    events = [json.loads(line)["event"] for line in (out / "adaptive_log.jsonl").read_text().splitlines()]
    assert (events.count("begin"), events.count("resumed")) == (1, 1), done.stderr[-3000:]
    other = tmp_path / "other"
    train_on_two(pruning_settings(tiny_llama, data_dir, other, **more), tmp_path / "logs")
    assert ranks(out) == ranks(other)
    assert len(set(ranks(out).values())) > 1
    assert adapters_equal(out, other)


@pytest.mark.parametrize(
    ("stage", "more"),
    [(2, {"quantization_bit": 4}), (3, {"adaptive_min_rank": 0})],
)
@pytest.mark.repeats  # of tests/e2e/test_engines.py, on fixed ranks
def test_deepspeed_trains_the_plan_on_two_processes(stage, more, tiny_llama, data_dir, tmp_path):
    config = EXAMPLES / "deepspeed" / f"ds_z{stage}_config.json"
    more |= {"deepspeed": str(config), "bf16": True, "save_strategy": "steps", "save_steps": 1}
    train_on_two(settings(tiny_llama, data_dir, tmp_path / "out", **more), tmp_path / "logs")
    out = tmp_path / "out"
    assert len(set(ranks(out).values())) > 1
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)
    assert (out / "checkpoint-1" / "adaptive_rank_plan.json").is_file()


@pytest.mark.repeats  # in this process: tests/unit/cli/test_commands.py
def test_plan_prints_a_table_and_trains_nothing(write, tmp_path):
    done = run(BIN / "llamafactory-adaptive", "plan", write(), "--out", tmp_path / "planned")
    assert "layer  q_proj  k_proj" in done.stdout
    assert "of 4,096 (uniform LoRA of rank 4)" in done.stdout
    assert "nothing was trained" in done.stdout
    assert sorted(p.name for p in (tmp_path / "planned").iterdir()) == [
        "adaptive_rank_plan.json",
        "adaptive_ranks.png",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.repeats  # in this process: tests/unit/cli/test_commands.py
def test_plan_keeps_its_hands_off_a_trained_adapter(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").touch()
    done = run(BIN / "llamafactory-adaptive", "plan", write(), expect=2)
    assert "it holds a trained adapter with its plan; try --out <another folder>" in done.stderr


@pytest.mark.repeats  # in this process: tests/contract/test_wrong_yaml.py
def test_what_the_host_refuses_is_one_message_before_scoring(write):
    done = run(BIN / "llamafactory-adaptive", "plan", write(val_size=0.1, eval_dataset="tiny_eval"), expect=2)
    assert "val_size: 0.1 is invalid: LLaMA-Factory refuses it (Cannot specify `val_size`" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Scoring modules" not in done.stderr


@pytest.mark.repeats  # what stops before torchrun starts, without it
@pytest.mark.parametrize("launcher", ["llamafactory-cli", "llamafactory-adaptive"])
def test_wrong_yaml_is_one_message_and_exit_code_2(launcher, write):
    done = run(BIN / launcher, "train", write(adaptive_min_rank=9, adaptve_method="x"), expect=2)
    assert "2 problems in the configuration" in done.stderr
    assert done.stderr.count("llamafactory-adaptive: error:") == 1
    assert "Traceback" not in done.stderr
    assert "Loading weights" not in done.stderr


def test_wrong_yaml_stops_before_torchrun_starts(write):
    """Even what only shows once the model's shapes are known."""
    config = write(lora_target="nope")
    done = run(BIN / "llamafactory-cli", "train", config, expect=2, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert done.stderr.count("lora_target: 'nope' is invalid") == 1
    assert "Traceback" not in done.stderr


def test_switched_off_the_plugin_is_not_there(write):
    done = run(BIN / "llamafactory-cli", "train", write(), expect=1, LLAMAFACTORY_ADAPTIVE="0")
    assert "Invalid fine-tuning method" in done.stderr  # upstream's own words: never silently plain LoRA
    done = run(BIN / "llamafactory-adaptive", "plan", write(), expect=2, LLAMAFACTORY_ADAPTIVE="0")
    assert "switches the plugin off" in done.stderr


def test_a_lock_left_by_a_killed_compiler_holds_nobody_up(write, tmp_path, monkeypatch):
    """On a CPU DeepSpeed would build an operator first, and wait for ever for a build that is dead."""
    extensions = tmp_path / "extensions"
    (extensions / "deepspeed_shm_comm").mkdir(parents=True)
    (extensions / "deepspeed_shm_comm" / "lock").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    config = str(EXAMPLES / "deepspeed" / "ds_z2_config.json")
    args = yaml.safe_load(write(adaptive_method="uniform", deepspeed=config).read_text())
    train_on_two(args, tmp_path / "logs")
    assert ranks(tmp_path / "out")
    assert [path.name for path in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"], "nothing was built"
