"""lm-evaluation-harness's own task files on local rows: ``python own_tasks.py URL TOKENIZER DATA_DIR [LIMIT]``.

Only the place of the data is replaced, and the columns that a local BoolQ names otherwise; for AQuA-RAT the rows are
read in AGIEval's form. Prints one JSON object: task and row to prompt and metrics.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager


FOLDER = Path(lm_eval.__file__).parent / "tasks"
OWN = {"gsm8k": "gsm8k/gsm8k.yaml", "boolq": "super_glue/boolq/default.yaml", "arc_easy": "arc/arc_easy.yaml",
       "arc_challenge": "arc/arc_challenge.yaml", "copa": "super_glue/copa/default.yaml",
       "aqua": "agieval/aqua-rat.yaml"}  # fmt: skip
LOCAL_BOOLQ = {"doc_to_target": "{{answer | int}}",
               "doc_to_text": "{{passage}}\nQuestion: {{question | replace('?', '')}}?\nAnswer:"}  # fmt: skip


def rows_of(name: str, data: Path) -> Path:
    """The rows to score."""
    return data / name / ("agieval.jsonl" if name == "aqua" else "dev.jsonl")


def write_task(folder: Path, name: str, data: Path) -> str:
    """A task file that includes the harness's own and replaces its data."""
    places = {"test": rows_of(name, data), "train": data / name / "train.jsonl"}
    files = {split: str(path) for split, path in places.items() if path.exists()}
    config = {
        "include": str(FOLDER / OWN[name]),
        "task": f"own_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "validation_split": None,
        "training_split": "train" if "train" in files else None,
        **(LOCAL_BOOLQ if name == "boolq" else {}),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return config["task"]


def main(url: str, tokenizer: str, data: Path, limit: int | None) -> None:
    """Ask the server and print what came of every row."""
    arguments = {"model": "base", "base_url": f"{url}/v1/completions", "tokenizer": tokenizer, "max_length": 8192,
                 "tokenizer_backend": "huggingface", "num_concurrent": 16, "revision": None}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        names = [write_task(Path(folder), name, data) for name in OWN if rows_of(name, data).exists()]
        manager = TaskManager(include_path=folder, include_defaults=False)
        evaluation = lm_eval.simple_evaluate("local-completions", arguments, names, bootstrap_iters=0, limit=limit,
                                             task_manager=manager)  # fmt: skip
    rows: dict[str, tuple[str, dict[str, float]]] = {}
    for task, samples in evaluation["samples"].items():
        for s in samples:
            suffix = "" if s["filter"] == "none" else f",{s['filter']}"
            metrics = {f"{m}{suffix}": float(s[m]) for m in s["metrics"]}
            key = f"{task.removeprefix('own_')} {s['doc_id']}"
            rows.setdefault(key, (s["arguments"][0][0], {}))[1].update(metrics)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
