"""What the public Python API promises, as a table: signatures, members, and what a type checker makes of them."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

import llamafactory_adaptive
from llamafactory_adaptive.api.scoring import ModuleScores
from tests.helpers.processes import ROOT
from tests.helpers.tiny import rows, tiny_model


# A change here is a change for users: CHANGELOG.md tells it.
FUNCTIONS = """
attach_adapter(model: Module, plan: RankPlan | str | Path, task_type: str = 'CAUSAL_LM', **settings: Any) ->
    PeftModel
calibration_batches(rows: Iterable[Mapping[str, Any]], batch_size: int = 8, pad_id: int | None = 0) ->
    list[Batch]
check_adapter(folder: str | Path, plan: RankPlan | str | Path) -> int
lora_config(plan: RankPlan | str | Path, task_type: str = 'CAUSAL_LM', **settings: Any) -> LoraConfig
plan_ranks(scores: ModuleScores, lora_rank: int = 8, lora_alpha: int | None = None, budget_unit: str =
    'params', min_rank: int = 1, max_rank: int | None = None, granularity: str = 'module') -> PrintablePlan
rank_search(model: Module, method: str = 'igu', lora_rank: int = 16, lora_alpha: int | None = None,
    target_modules: str | Sequence[str] = 'all-linear', task_type: str = 'CAUSAL_LM', budget_unit: str =
    'params', min_rank: int = 1, max_rank: int | None = None, init_rank: int | None = None, warmup_ratio:
    float | None = None, final_ratio: float | None = None, interval: int | None = None, interval_epochs: float
    | None = None, max_overhead: float | None = None, best_model_from: str = 'final', max_nonfinite_steps: int
    = 3, lora_settings: Mapping[str, Any] | None = None, seed: int = 0, **options: Any) -> RankSearch
score_modules(model: Module, batches: Sequence[Batch], method: str = 'sensitivity', target_modules: str |
    Sequence[str] = 'all-linear', forward: Callable[[Module, Batch], Any] | None = None, seed: int = 0,
    **options: Any) -> ModuleScores
"""
MEMBERS = {
    "ModuleScores": """
facts: Mapping[str, Any]
method: str
options: Mapping[str, Any]
score(self, lora_rank: int = 8) -> Scores
seed: int
shapes: tuple[ModuleShape, ...]
statistics: Mapping[str, Tensor]
""",
    "PrintablePlan": """
active: tuple[ModulePlan, ...]
budget(self) -> dict[str, int]
budget_kind: str
budget_unit: str
differences(self, shapes: tuple[ModuleShape, ...] | list[ModuleShape]) -> list[str]
digest(self) -> str
from_plan(cls, plan: RankPlan) -> PrintablePlan
largest_rank: int
lora_alpha: float
lora_rank: int
method: str
modules: tuple[ModulePlan, ...]
options: Mapping[str, Any]
provenance: Mapping[str, Any]
ranks(self) -> dict[str, int]
save(self, path: str | Path) -> None
scale: float
table(self) -> str
to_json(self) -> dict[str, Any]
write(self, path: Path) -> None
""",
    "RankSearch": """
callback: AdaptiveCallback
finalize(self, folder: str | Path) -> PrintablePlan
model: PeftModelForCausalLM
plan: PrintablePlan
trainer(self, trainer_class: type[~AnyTrainer]) -> type[~AnyTrainer]
""",
}


def bare(text):
    """A type without the modules it comes from."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


def signature(name, function):
    """``name(argument: type = default, ...) -> type``."""
    return bare(f"{name}{inspect.signature(function, eval_str=True)}")


def member(holder, name):
    """A method's signature, a property's type, or a field's or an attribute's."""
    held = inspect.getattr_static(holder, name)
    if isinstance(held, property):
        return signature(name, held.fget).replace("(self) -> ", ": ")
    if isinstance(held, classmethod) or inspect.isroutine(held):
        return signature(name, getattr(held, "__func__", held))
    fields = getattr(holder, "__dataclass_fields__", {})
    kind = fields[name].type if name in fields else type(held)
    return f"{name}: {bare(inspect.formatannotation(kind))}"


def table(lines):
    return "".join(textwrap.fill(line, 110, subsequent_indent="    ", break_on_hyphens=False) + "\n" for line in lines)


def public(holder):
    return table(member(holder, name) for name in dir(holder) if not name.startswith("_"))


def test_names_and_full_signatures_are_frozen():
    functions = {name: getattr(llamafactory_adaptive, name) for name in llamafactory_adaptive.__all__}
    assert table(signature(*each) for each in sorted(functions.items())) == FUNCTIONS.lstrip()
    assert set(functions) <= set(dir(llamafactory_adaptive))
    with pytest.raises(AttributeError, match="has no attribute 'plan_rank'"):
        _ = llamafactory_adaptive.plan_rank


@pytest.fixture(scope="module")
def made():
    """One of each class that the functions return."""
    scores = llamafactory_adaptive.score_modules(tiny_model(), llamafactory_adaptive.calibration_batches(rows(4)))
    assert isinstance(scores, ModuleScores)
    plan = llamafactory_adaptive.plan_ranks(scores, 4)
    return {type(each).__name__: each for each in (scores, plan, llamafactory_adaptive.rank_search(tiny_model()))}


def test_public_members_of_what_is_returned_are_frozen(made):
    assert {name: public(each) for name, each in made.items()} == {
        name: text.lstrip() for name, text in MEMBERS.items()
    }


# -- a type checker --------------------------------------------------------------------------------------------------

USER = """from collections.abc import Mapping
from pathlib import Path

from torch import nn

from llamafactory_adaptive import (
    attach_adapter, calibration_batches, check_adapter, lora_config, plan_ranks, rank_search, score_modules,
)


class Trainer:
    def train(self) -> None: ...


def before_training(model: nn.Module, rows: list[dict[str, list[int]]], folder: Path) -> int:
    scores = score_modules(model, calibration_batches(rows, batch_size=4), transform="log")
    values: Mapping[str, float] = scores.score(lora_rank=8).values
    plan = plan_ranks(scores, lora_rank=8, budget_unit="params", max_rank=None)
    ranks: dict[str, int] = plan.ranks()
    text: str = plan.table()
    print(values, ranks, text, plan.budget()["used_parameters"], lora_config(plan, lora_dropout=0.05))
    plan.save(folder / "plan.json")
    attach_adapter(model, folder / "plan.json", task_type="CAUSAL_LM")
    return check_adapter(str(folder), plan)


def while_training(model: nn.Module, folder: Path) -> dict[str, int]:
    search = rank_search(model, method="igu", lora_rank=16, importance="integrated", max_overhead=0.2)
    trainer: Trainer = search.trainer(Trainer)()
    trainer.train()
    print(search.plan.table(), search.model, search.callback)
    return search.finalize(folder).ranks()
"""
WRONG = """from llamafactory_adaptive import calibration_batches, check_adapter, plan_ranks, rank_search

plan_ranks("scores")
calibration_batches([{"input_ids": [1]}], batch_size="8")
count: str = check_adapter("out", "plan.json")
rank_search(None, min_rank=1).finalise("out")
"""
# What is not ours is not followed: that would take a minute.
SETTINGS = """[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,numpy.*,matplotlib.*,accelerate.*,safetensors.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy: pip install .[lint]")
def test_a_users_program_is_checked_by_our_types(tmp_path):
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    assert [name for name in llamafactory_adaptive.__all__ if f"{name}(" not in USER] == [], "every name is used"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "user.py", "wrong.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    *errors, summary = done.stdout.splitlines()
    assert [re.sub(r": error: .*\[", " [", line) for line in errors] == [
        "wrong.py:3 [arg-type]", "wrong.py:4 [arg-type]", "wrong.py:5 [assignment]", "wrong.py:6 [attr-defined]",
    ], done.stdout + done.stderr  # fmt: skip
    assert 'incompatible type "str"; expected "ModuleScores"' in errors[0]
    assert summary == "Found 4 errors in 1 file (checked 2 source files)"
