"""Whole runs through lm-evaluation-harness, in its own environment, with a small script in vLLM's place."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval.harness import ALL, PYTHON, needs_environment
from tests.helpers.processes import FAKE_SERVER, ROOT, processes_naming


OWN_TASKS = Path(__file__).with_name("own_tasks.py")  # run with the other Python
pytestmark = needs_environment


@pytest.mark.parametrize("protocol", ["lm_eval", "llm_adapters"])
def test_a_whole_run(protocol, harness, model):
    out, _ = harness.run("--merged", f"tuned={model}", "--log-samples", "--limit", 4, protocol=protocol)
    document = harness.results()
    assert (document["schema_version"], document["protocol"], document["limit"]) == (3, protocol, 4)
    assert {(s["model"], s["task"]) for s in document["scores"]} == {
        (m, t) for m in ("base", "tuned") for t in ALL.split(",")}  # fmt: skip
    assert all(s["n"] == 4 and s["protocol"] == protocol for s in document["scores"])
    extractions = {s["metric"] for s in document["scores"] if s["task"] == "gsm8k"}
    assert (
        extractions
        == {
            "lm_eval": {f"exact_match,{f}" for f in ("strict-match", "flexible-extract", "training-format")},
            "llm_adapters": {"acc", "strict", "flexible", "training"},
        }[protocol]
    )
    assert document["versions"]["vllm"] == "0.0.fake"
    samples = harness.samples()
    assert len(samples) == 2 * 6 * 4
    for score in document["scores"]:  # the table is the mean of what samples.jsonl holds
        values = [s["metrics"][score["metric"]] for s in samples
                  if (s["model"], s["task"]) == (score["model"], score["task"])]  # fmt: skip
        assert score["value"] == pytest.approx(sum(values) / 4)
    assert out.count("Protocol ") == 1
    assert (harness.out / "out" / "eval_results.png").exists()
    # The fake server answers by a hash of the prompt: both models alike.
    assert document["comparisons"][0]["mean_difference"]["value"] == 0


def test_lm_evals_own_tasks_give_the_same_numbers(harness, tmp_path, port):
    """Its task files, only the data replaced, against ours: same prompts, same scores, row by row."""
    harness.run("--log-samples", protocol="lm_eval")
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), str(port), "base"])
    try:
        done = subprocess.run(
            [PYTHON, OWN_TASKS, f"http://127.0.0.1:{port}", harness.base, harness.rows], text=True,
            capture_output=True, check=False, cwd=ROOT)  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == 6 * 5
    for ours in harness.samples():
        prompt, metrics = theirs[f"{ours['task']} {ours['row']}"]
        assert ours["prompt"] == prompt
        assert metrics.items() <= ours["metrics"].items()


def test_prompts_of_the_papers(harness):
    harness.run("--log-samples", "--limit", 2)
    shown = {s["task"]: s["prompt"].split("### Instruction:\n")[1] for s in harness.samples()}
    end = "\n\n### Response:\n"
    assert shown == {
        "gsm8k": "What is 1 plus 2 in words and figures?" + end,
        "boolq": "Please answer the following question with true or false, question: is 1 odd?\n\nAnswer format: "
                 "true/false" + end,
        **dict.fromkeys(("arc_easy", "arc_challenge"),
                        "Please choose the correct answer to the question: Which one is number 1?\n\nAnswer1: sun "
                        "Answer2: moon Answer3: grey sea\n\nAnswer format: answer1/answer2/answer3" + end),
        "aqua": "What is 1 x 2? Answer Choices: (A) 2 (B) 90 (C) 91 (D) 92 (E) 93" + end,
        "copa": "Please choose the correct solution to the question: The man counted to 1. What was the effect?\n\n"
                "Solution1: He was bored. Solution2: He slept.\n\nAnswer format: solution1/solution2" + end,
    }  # fmt: skip


def test_seeds_draw_other_examples(harness):
    harness.run("--log-samples", "--seeds", "1,2", protocol="lm_eval", tasks="gsm8k,arc_easy")
    prompts = {(s["task"], s["seed"]): s["prompt"] for s in harness.samples() if s["row"] == 0}
    assert set(prompts) == {("gsm8k", 1), ("gsm8k", 2), ("arc_easy", 1)}  # nothing to draw, nothing to repeat
    assert prompts["gsm8k", 1] != prompts["gsm8k", 2]


def test_the_chat_template_goes_around_the_question(harness, tiny_llama, tmp_path):
    _, err = harness.run("--template", "training", expect=2, out="refused")
    assert f"--template training: {tiny_llama} has no chat template; use --template none" in err
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    harness.base = tmp_path / "chatty"
    harness.base.mkdir()
    for file in tiny_llama.iterdir():
        (harness.base / file.name).symlink_to(file)
    (harness.base / "chat_template.jinja").write_text(template)
    harness.run("--template", "training", "--log-samples", tasks="gsm8k")
    assert harness.samples()[0]["prompt"] == "[user]What is 0 plus 1 in words and figures?[me]"
    harness.run("--template", "training", "--log-samples", tasks="gsm8k", protocol="lm_eval", out="fewshot")
    assert harness.samples("fewshot")[0]["prompt"].count("[assistant]") == 5  # examples become turns


def test_beams_give_the_first_and_cut_at_stop_words(harness):
    harness.run("--log-samples", "--num-beams", 3, protocol="lm_eval", tasks="gsm8k")
    answers = [s["response"] for s in harness.samples()]
    assert answers == ["beam 0 #### 7\n\n"] * 5


def test_cut_prompts_are_told_in_table_and_results(harness):
    """GSM8K may answer with 256 tokens, BoolQ with 32: only the former leaves too few for the prompt."""
    out, _ = harness.run(fake="--length 320", tasks="gsm8k,boolq")
    told = {s["task"]: (s["n_cut"], s["n"]) for s in harness.results()["scores"]}
    assert told == {"gsm8k": (5, 5), "boolq": (0, 5)}
    assert "CUT: base, gsm8k: 5 of 5 prompts were longer than the server takes" in out


def test_results_identify_rows(harness):
    harness.run(tasks="gsm8k")
    harness.run("--limit", 2, tasks="gsm8k", out="two")
    first, second = (harness.results(out)["data"]["sets"]["gsm8k"] for out in ("out", "two"))
    assert first["sha256"] == second["sha256"]
    assert first["scored_sha256"] != second["scored_sha256"]
    assert len(first["scored_sha256"]) == 64


def test_code_of_a_tokenizer_is_not_run(harness, tiny_llama, tmp_path):
    harness.base = tmp_path / "foreign"
    harness.base.mkdir()
    (harness.base / "config.json").write_text("{}")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (harness.base / "tokenizer_config.json").write_text(json.dumps(config))
    _, err = harness.run(expect=2)
    assert "needs code that comes with it, which is never run" in err


def test_the_benchmark_leaves_memory_for_both_engines():
    code = (
        "import sys; sys.path[:0] = ['benchmarks', '.']; import eval_throughput as b\n"
        "from types import SimpleNamespace\n"
        "b.on_cpu = lambda: False; b.arguments.parse = print\n"
        "b.request(SimpleNamespace(base='x', data='d', rows=1, max_length=9), 'o')"
    )
    done = subprocess.run([PYTHON, "-c", code], text=True, capture_output=True, check=True, cwd=ROOT)
    assert "--max-model-len 9 --gpu-memory-utilization 0.4" in done.stdout


def test_a_server_that_dies_in_the_middle_is_one_line(harness):
    _, err = harness.run(fake="--die-after 7", expect=2)
    (line,) = [line for line in err.splitlines() if line.startswith("eval: error:")]
    assert "the server ended while base was asked: exit code 9; MemoryError: the fake engine is out of memory" in line
    assert not (harness.out / "out" / "eval_results.json").exists()


def test_a_server_that_does_not_start_is_one_line(harness):
    _, err = harness.run(fake="--say 'RuntimeError: DefaultCPUAllocator: out of memory' --exit 1", expect=2)
    assert (
        "eval: error: the server did not start: exit code 1; RuntimeError: DefaultCPUAllocator: out of memory" in err
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fake", ["--wait 60", "--child {}"])
def test_an_interruption_leaves_nothing(number, fake, harness, tmp_path):
    process = harness.start(fake=fake.format(tmp_path / "pids"))
    for line in process.stdout:
        if "starting vLLM" in line and "wait" in fake:
            time.sleep(1)
            break
        if "vLLM is up" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == (
        "eval: interrupted; no server was left running. Answers are kept: the same command goes on"
    )
    assert not (harness.out / "out" / "eval_results.json").exists()
    assert not processes_naming(str(FAKE_SERVER))
    if (tmp_path / "pids").exists():
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in (tmp_path / "pids").read_text().split())


def test_a_running_server_is_asked_and_left_running(harness, port):
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), str(port), "other,one"])
    try:
        time.sleep(1)
        process = harness.start("--base-url", f"http://127.0.0.1:{port}/v1", "--adapter", "one=anything")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert {s["model"] for s in harness.results()["scores"]} == {"base", "one"}
        process = harness.start("--base-url", f"http://127.0.0.1:{port}", "--adapter", "two=x", out="second")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert f"the server at http://127.0.0.1:{port} does not serve two; it serves other, one" in err
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


def test_a_foreign_server_that_dies_in_the_middle_is_one_line(harness, port):
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), str(port), "base", "--die-after", "7"])
    try:
        time.sleep(1)
        process = harness.start("--base-url", f"http://127.0.0.1:{port}")
        _, err = process.communicate(timeout=120)
    finally:
        server.kill()
        server.wait()
    assert process.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("eval: error:")]
    assert f"http://127.0.0.1:{port} failed while base was asked" in line


def test_an_unreachable_server_is_one_line(harness, port):
    _, err = harness.run("--base-url", f"http://127.0.0.1:{port}", expect=2)
    assert f"eval: error: no OpenAI-compatible server answers at http://127.0.0.1:{port}/v1/models:" in err


def test_rows_of_the_training_file_are_refused_before_a_server_starts(harness):
    out, err = harness.run("--train-file", harness.rows / "gsm8k" / "dev.jsonl", expect=2)
    assert "gsm8k: 5 of 5 rows were in the training or calibration data, first: 'What is 0 plus 1" in err
    assert "starting" not in out
    out, _ = harness.run("--train-file", harness.rows / "gsm8k" / "train.jsonl")
    assert "none of 30 rows stands in" in out


def test_a_tokenizer_that_cannot_be_loaded(harness, model):
    harness.base = model
    _, err = harness.run(expect=2)
    assert f"eval: error: the tokenizer of {model} cannot be loaded" in err
