"""The harness without lm-evaluation-harness and vLLM: ``python fake_harness.py STATE -m eval.run ...``.

Options, rows, output folders, results and statistics are the harness's own. What is replaced: rows come as they are,
and models answer at once, right or wrong by a hash. The folder STATE says how, and takes what was asked:

* ``right.json``: share of right answers by the beginning of a model's folder's name; others have one half.
* ``delay``: seconds before each answer. ``broken``: the name of a folder whose model cannot be served, its beginning.
* ``cpu``: vLLM is the CPU build. ``no_vllm``: there is none.
* ``asked``: one line per answer, ``calls``: one per command; both are written.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
STATE = Path(sys.argv[1])


@dataclass(frozen=True)
class Sample:
    task: str
    seed: int
    row: int
    question: str
    metrics: dict
    repeat: int = 0
    prompt: str = "p"
    target: str = "t"
    response: str = "r"
    extracted: dict = field(default_factory=dict)


def stand_in(name, **members):
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(members)
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)


def scored(loaded, limit):
    return loaded[:limit]


def load(tasks, template, files, strip_thinking=False):
    from eval.data import read_splits

    return [read_splits(files[task.name])["test"] for task in tasks]


def setting(name, default=None):
    return (STATE / name).read_text() if (STATE / name).exists() else default


def answer(folder, task, row):
    """Answer one question: right in a share of cases that depends on the arm, by a hash of arm, task and row.

    The rest of a folder's name is a digest of settings, paths among them: with it seeds would differ from run to run.
    """
    time.sleep(float(setting("delay", "0")))
    shares = json.loads(setting("right.json", "{}"))
    share = next((share for name, share in shares.items() if folder.name.startswith(name)), 0.5)
    with (STATE / "asked").open("a") as file:
        file.write(f"{folder.name} {task} {row}\n")
    arm = folder.name.partition("-")[0]
    drawn = hashlib.sha256(f"{arm} {task} {row}".encode()).digest()
    return float(int.from_bytes(drawn[:4], "big") / 2**32 < share)


def ask(self, serving, title):
    """Stand in for ``Round.ask``: what is kept is not asked again."""
    from eval.cache import key_of
    from eval.errors import EvalError

    paths = {model.name: Path(model.path) for model in self.request.models}
    self.record.versions["vllm"] = "0.0.fake"
    for job in serving.jobs:
        if (broken := setting("broken")) is not None and paths[job.model].name.startswith(broken.strip()):
            raise EvalError(f"--{job.form} {job.model}: the fake server does not take it")
        samples = []
        for task in job.tasks:
            for row, values in enumerate(scored(self.loaded[task.name], self.request.limit)):
                key = key_of("fake", str(paths[job.model]), task.name, row)
                if key not in self.cache:
                    self.cache.add(key, answer(paths[job.model], task.name, row))
                made = {task.headline: self.cache[key]}
                samples.append(Sample(task.name, 1234, row, str(values[task.question]), made))
        self._gather(job, SimpleNamespace(samples=samples, cut={}, requests=1, fresh=1, seconds=0.0))


def main():
    import eval.asking
    import eval.models
    import eval.server

    with (STATE / "calls").open("a") as file:
        file.write(json.dumps(sys.argv[2:]) + "\n")
    if not (STATE / "no_vllm").exists():
        stand_in("vllm")
    stand_in("lm_eval")
    stand_in(
        "eval.client",
        quiet=lambda: SimpleNamespace(texts=[]),
        load=load,
        questions=lambda task, loaded, limit: [row[task.question] for row in scored(loaded, limit)],
        commonest_share=lambda loaded, limit: 0.625,
        scored_digest=lambda loaded, limit: hashlib.sha256(json.dumps(scored(loaded, limit)).encode()).hexdigest(),
    )
    stand_in("eval.hub", check_tokenizers=lambda *_: None, commit_of=lambda name: "0" * 40)
    eval.server.on_cpu = (STATE / "cpu").exists
    eval.asking.Round.ask = ask
    from eval import check, rows, run

    assert sys.argv[2] == "-m"
    return {"eval.run": run, "eval.check": check, "eval.rows": rows}[sys.argv[3]].main(sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
