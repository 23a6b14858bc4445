"""Which server gets which model and task."""

import json
from pathlib import Path

import pytest

from eval.models import Model, lora_rank_to_reserve, plan_servings, tokenizer_of
from eval.protocols import PROTOCOLS, load_tasks, task_config, task_names
from eval.server import ServerOptions, vllm_command


BASE, ONE, TWO, MERGED = (Model("base", "base", "/b"), Model("one", "adapter", "/1"), Model("two", "adapter", "/2"),
                          Model("one", "merged", "/m"))  # fmt: skip
TASKS = load_tasks("lm_eval", ["gsm8k", "arc_easy"])


def outline(servings):
    return [
        (s.model, [a.name for a in s.adapters], [(j.model, j.form, [t.name for t in j.tasks]) for j in s.jobs])
        for s in servings
    ]


def test_one_server_for_base_and_adapters_on_a_gpu():
    both = ["gsm8k", "arc_easy"]
    assert outline(plan_servings([BASE, ONE, TWO, MERGED], TASKS, on_cpu=False)) == [
        ("/b", ["one", "two"], [("base", "base", both), ("one", "adapter", both), ("two", "adapter", both)])
    ]


def test_on_a_cpu_likelihood_goes_where_no_lora_is():
    assert outline(plan_servings([BASE, ONE, MERGED], TASKS, on_cpu=True)) == [
        ("/b", [], [("base", "base", ["arc_easy"])]),
        ("/b", ["one"], [("base", "base", ["gsm8k"]), ("one", "adapter", ["gsm8k"])]),
        ("/m", [], [("one", "merged", ["arc_easy"])]),
    ]


def test_generation_alone_needs_one_server_on_a_cpu_too():
    tasks = load_tasks("llm_adapters", ["gsm8k", "arc_easy"])
    assert len(plan_servings([BASE, ONE, TWO, MERGED], tasks, on_cpu=True)) == 1


def test_a_merged_model_of_its_own_takes_everything():
    assert outline(plan_servings([BASE, MERGED], TASKS, on_cpu=True)) == [
        ("/b", [], [("base", "base", ["gsm8k", "arc_easy"])]),
        ("/m", [], [("one", "merged", ["gsm8k", "arc_easy"])]),
    ]


@pytest.mark.parametrize(
    ("config", "rank"), [({"r": 8}, 8), ({"r": 9}, 16), ({"r": 4, "rank_pattern": {"x": 65}}, 128)]
)
def test_the_reserved_rank_is_one_that_vllm_takes(config, rank, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora_rank_to_reserve([tmp_path]) == rank


def test_many_beams_get_their_log_probabilities():
    (serving,) = plan_servings([BASE], TASKS[:1], on_cpu=False)
    assert "--max-logprobs" not in vllm_command(serving, 9, ServerOptions(num_beams=10))
    words = vllm_command(serving, 9, ServerOptions(num_beams=11))
    assert words[words.index("--max-logprobs") + 1] == "22"


def test_the_command_line_of_vllm(adapter, monkeypatch):
    monkeypatch.setattr("eval.server.on_cpu", lambda: True)
    (serving,) = plan_servings([BASE, Model("one", "adapter", str(adapter))], TASKS[:1], on_cpu=True)
    words = " ".join(vllm_command(serving, 9, ServerOptions(extra=("--seed", "1"), token="7f")))
    assert words.split(" ", 1)[1] == (
        "-m vllm.entrypoints.openai.api_server --model /b --served-model-name base-7f --host 127.0.0.1 --port 9 "
        "--generation-config vllm --dtype float32 --enforce-eager --enable-lora --max-lora-rank 64 --max-loras 1 "
        f'--lora-modules {{"name": "one-7f", "path": "{adapter}"}} --seed 1'
    )
    assert "trust" not in words


@pytest.mark.parametrize("folder", ["lr=1e-4,rank=8", "with space", "\udcff"])
def test_a_folder_of_any_name_reaches_vllm_whole(folder, monkeypatch):
    monkeypatch.setattr("eval.server.lora_rank_to_reserve", lambda _: 8)
    (serving,) = plan_servings([BASE, Model("one", "adapter", folder)], TASKS[:1], on_cpu=False)
    words = vllm_command(serving, 9, ServerOptions(token="7f"))
    # vLLM reads a word with a comma as JSON, NAME=PATH otherwise.
    assert json.loads(words[words.index("--lora-modules") + 1]) == {"name": "one-7f", "path": folder}


def test_a_tokenizer_that_came_along_is_used(tmp_path):
    model = Model("m", "merged", str(tmp_path))
    assert tokenizer_of(model, "/b") == "/b"
    (tmp_path / "tokenizer_config.json").touch()
    assert tokenizer_of(model, "/b") == str(tmp_path)


@pytest.mark.parametrize(("protocol", "name"), [(p, n) for p in PROTOCOLS for n in task_names(p)])
def test_every_task_file_is_whole(protocol, name):
    (task,) = load_tasks(protocol, [name])
    assert task.config["task"] == name
    assert task.version
    metrics = {f"{m['metric']}{suffix}" for m in task.config["metric_list"]
               for suffix in [f",{f['name']}" for f in task.config.get("filter_list", [])] or [""]}  # fmt: skip
    assert task.headline in metrics
    assert task.likelihood == ("generation_kwargs" not in task.config)
    if not task.likelihood:
        assert task.config["generation_kwargs"]["do_sample"] is False


def test_local_files_take_the_place_of_the_hub():
    config = task_config(TASKS[0], "none", {"test": Path("/d/dev.jsonl"), "train": Path("/d/train.jsonl")})
    assert config["dataset_path"] == "local rows"
    assert (config["test_split"], config["fewshot_split"], config["dataset_name"]) == ("test", "train", None)
    assert TASKS[0].config["dataset_path"] == "openai/gsm8k"


def test_the_papers_prompt_stands_around_raw_text_alone():
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    assert task_config(task, "training", None)["doc_to_text"] == "{{question}}"
    assert task_config(task, "none", None)["doc_to_text"].endswith("### Instruction:\n{{question}}\n\n### Response:\n")
