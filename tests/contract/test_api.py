"""The public Python API: its page and messages; it is imported late and needs no host."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import llamafactory_adaptive
from llamafactory_adaptive.errors import AdaptiveConfigError, PlanError
from tests.helpers.tiny import rows, tiny_model


ROOT = Path(__file__).resolve().parents[2]


def test_names_are_listed_before_anything_is_imported():
    code = (
        "import sys, llamafactory_adaptive as l; before = dir(l); print('torch' in sys.modules); "
        "from llamafactory_adaptive import plan_ranks; print('torch' in sys.modules, 'plan_ranks' in before, "
        "'llamafactory' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]


def test_the_page_is_made_from_the_docstrings():
    made = runpy.run_path(str(ROOT / "docs" / "make_api_page.py"))["page"]()
    assert (ROOT / "docs" / "python-api.md").read_text() == made, "run python docs/make_api_page.py"


def test_the_package_is_marked_as_typed():
    assert (Path(llamafactory_adaptive.__file__).parent / "py.typed").is_file()


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores():
    return llamafactory_adaptive.score_modules(tiny_model(), llamafactory_adaptive.calibration_batches(rows(4)))


def problems(function, *given, **named):
    with pytest.raises(AdaptiveConfigError) as caught:
        function(*given, **named)
    return {problem.key: (problem.allowed, problem.suggestion) for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("given", "key", "suggestion"),
    [
        ({"method": "sensitivty"}, "method", "method='sensitivity'"),
        ({"method": "igu"}, "method", "rank_search(model, method='igu')"),
        ({"energi": 0.5}, "energi", "energy=..."),
        ({"energy": 3}, "energy", "energy=0.85"),
        ({"transform": "logg"}, "transform", "transform='log'"),
        ({"target_modules": "qproj"}, "target_modules", None),
        ({"target_modules": []}, "target_modules", None),
        ({"target_modules": ["embed_tokens"]}, "target_modules", None),
        ({"batches": []}, "batches", "batches=calibration_batches(rows, batch_size=8)"),
        ({"batches": [{"input_ids": [1]}]}, "batches", "batches=calibration_batches(rows, batch_size=8)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_of_scoring(given, key, suggestion):
    named = {"batches": llamafactory_adaptive.calibration_batches(rows(2)), **given}
    refused = problems(llamafactory_adaptive.score_modules, tiny_model(), **named)
    assert list(refused) == [key]
    if suggestion is None:
        suggestion = (
            "target_modules='all-linear', or some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        )
    assert refused[key][1] == suggestion


@pytest.mark.parametrize(
    ("given", "suggestions"),
    [
        ({"lora_rank": 0}, {"lora_rank": "lora_rank=8"}),
        ({"lora_rank": 4, "max_rank": 2}, {"max_rank": "max_rank=16"}),
        ({"lora_rank": 4, "min_rank": 9}, {"min_rank": "min_rank=1"}),
        ({"lora_rank": 4, "lora_alpha": 0.5}, {"lora_alpha": "lora_alpha=8"}),
        (
            {"budget_unit": "parameters", "max_rank": "high"},
            {"budget_unit": "budget_unit='params'", "max_rank": "leaving max_rank out"},
        ),
    ],
    ids=str,
)
def test_wrong_arguments_of_planning_are_told_all_at_once(scores, given, suggestions):
    refused = problems(llamafactory_adaptive.plan_ranks, scores, **given)
    assert {key: suggestion for key, (_, suggestion) in refused.items()} == suggestions


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        ({"method": "sensitivity"}, "method", "score_modules(model, batches, method='sensitivity')"),
        ({"method": "tsq"}, "sampling", "sampling=False"),
        ({"method": "tsq", "sampling": False, "interval": 3}, "interval", "leaving it out, or method='igu'"),
        ({"method": "tsq", "sampling": False, "min_rank": 0}, "min_rank", "min_rank=1"),
        ({"init_rank": 3}, "init_rank", "init_rank=8"),
        ({"interval": 3, "interval_epochs": 0.2}, "interval_epochs", "leaving interval out"),
        ({"max_overhead": 0.1}, "max_overhead", "leaving it out"),
        ({"warmup_ratio": 0.9, "final_ratio": 0.5}, "warmup_ratio", "warmup_ratio=0.25"),
        ({"lora_settings": {"r": 3}}, "r", "plan_ranks with another lora_rank or lora_alpha"),
        ({"lora_settings": {"lora_dropot": 0.1}}, "lora_dropot", "lora_dropout=..."),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_search(given, key, words):
    refused = problems(llamafactory_adaptive.rank_search, tiny_model(), **{"lora_rank": 4, **given})
    assert {name: suggestion for name, (_, suggestion) in refused.items()} == {key: words}
    assert not any("adaptive_" in text for pair in refused.values() for text in pair)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ([], "rows"),
        ([{"labels": [1]}], "rows[0]"),
        ([{"input_ids": [1, 2], "labels": [1]}], "rows[0]"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "attention_mask": [0, 0]}], "rows[1]"),
    ],
    ids=str,
)
def test_wrong_rows(wrong, key):
    assert list(problems(llamafactory_adaptive.calibration_batches, wrong)) == [key]
    assert list(problems(llamafactory_adaptive.calibration_batches, rows(2), batch_size=0)) == ["batch_size"]


def test_rows_lose_what_their_mask_leaves_out():
    (batch,) = llamafactory_adaptive.calibration_batches(
        [{"input_ids": [9, 5, 6], "attention_mask": [0, 1, 1]}, {"input_ids": [7], "labels": [-100]}], pad_id=None
    )
    assert batch.input_ids.tolist() == [[5, 6], [7, 0]]
    assert batch.labels.tolist() == [[5, 6], [-100, -100]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]


def test_a_model_with_an_adapter_and_a_lost_plan_are_refused(scores, tmp_path):
    plan = llamafactory_adaptive.plan_ranks(scores, 2)
    adapted = llamafactory_adaptive.attach_adapter(tiny_model(), plan)
    assert list(problems(llamafactory_adaptive.rank_search, adapted)) == ["model"]
    with pytest.raises(PlanError, match="cannot read the plan"):
        llamafactory_adaptive.check_adapter(tmp_path, tmp_path / "no.json")


# -- without LLaMA-Factory -------------------------------------------------------------------------------------------


@pytest.fixture
def no_host(tmp_path, monkeypatch):
    """Make llamafactory unimportable in processes started from here."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'llamafactory':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Gone())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False,
                          env={**os.environ, "TQDM_DISABLE": "1"})  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.usefixtures("no_host")
def test_without_the_host_the_hook_is_silent_and_the_commands_say_so_in_one_line():
    assert run("-c", "import json") == (0, "", "")
    assert "No module named 'llamafactory'" in run("-c", "import llamafactory")[2]
    code, out, error = run("-m", "llamafactory_adaptive.cli", "doctor")
    assert (code, error, len(out.splitlines())) == (0, "", 1)
    assert "LLaMA-Factory is not installed" in out
    code, out, error = run("-m", "llamafactory_adaptive.cli", "train", "any.yaml")
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert "needs LLaMA-Factory, which is not installed: pip install -c constraints/llamafactory-0.9.5.txt" in error
    assert run("-m", "llamafactory_adaptive.cli", "export", "--help")[0] == 0
