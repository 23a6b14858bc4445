"""The recipes of `examples/papers` hold what their sources state, and train on what the evaluation asks."""

import json
import math
import re
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from transformers import HfArgumentParser

from eval.protocols import ALPACA, load_tasks
from eval.tasks import parsing, rows
from llamafactory_adaptive import _bootstrap


_bootstrap.install()
from llamafactory.data.template import TEMPLATES  # noqa: E402
from llamafactory.hparams import parser as host  # noqa: E402

from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402
from llamafactory_adaptive.methods import make_method  # noqa: E402
from llamafactory_adaptive.ranks.plan import ModuleShape  # noqa: E402
from llamafactory_adaptive.ranks.schedule import make_schedule  # noqa: E402
from tests.helpers.data_tables import write_data_table  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
RECIPES = {path.stem: path for path in sorted((ROOT / "examples" / "papers").glob("*.yaml"))}
sys.path.insert(0, str(DATA))
import prepare  # noqa: E402


# What the papers state, by recipe: the values that a recipe marks with "paper" are these and no others.
QWEN = {"model_name_or_path": "Qwen/Qwen2.5-0.5B"}
IGU = {"adaptive_method": "igu", "igu_intervals": 20, "adaptive_init_rank": 32, "lora_rank": 16,
       "adaptive_budget_unit": "params", "adaptive_warmup_ratio": 2 / 10, "adaptive_final_ratio": (10 - 5) / 10,
       "adaptive_interval_epochs": 1 / 5, "early_stopping_steps": 10}  # fmt: skip
SENSITIVITY = {"adaptive_method": "sensitivity", "sensitivity_transform": "none", "sensitivity_metric": "both",
               "sensitivity_combination": "dispersion", "sensitivity_top_fraction": 1 / 2, "sensitivity_energy": 0.85,
               "sensitivity_allocation": "sra", "adaptive_budget_unit": "ranks", "learning_rate": 5e-4,
               "num_train_epochs": 10}  # fmt: skip
PAPER = {
    "igu_lora_boolq": {**QWEN, **IGU, "dataset": "boolq_no_passage"},
    **{f"igu_lora_{name}": {**QWEN, **IGU, "dataset": name}
       for name in ("arc_easy", "arc_challenge", "gsm8k", "aqua")},
    "igu_lora_boolq_second_stage": {**QWEN, "adaptive_method": "igu", "dataset": "boolq_no_passage", "lora_rank": 16,
                                    "early_stopping_steps": 10},
    "igu_lora_copa": {**IGU, "dataset": "copa"},
    "igu_lora_sst2_llama2": {},
    "sensitivity_lora_qwen2_5_7b": {
        **SENSITIVITY, "model_name_or_path": "Qwen/Qwen2.5-7B", "gradient_accumulation_steps": 32 / 4,
    },
    "sensitivity_lora_llama3_1_8b": {
        **SENSITIVITY, "model_name_or_path": "meta-llama/Llama-3.1-8B", "gradient_accumulation_steps": 32 / 4,
    },
    "sensitivity_lora_qwen2_5_32b_ds3": {
        **SENSITIVITY, "model_name_or_path": "Qwen/Qwen2.5-32B", "gradient_accumulation_steps": 32 / 8,
    },
    "tsqlora_qwen2_5_0_5b": {"adaptive_method": "tsq", "tsq_temperature": 0.7, "tsq_clip_quantile": 1.0,
                             "tsq_sensitivity": "weight_gradient", "lora_rank": 4},
}  # fmt: skip
# Rows of the training sets on the hub.
ROWS = {"boolq_no_passage": 9427, "arc_easy": 2251, "arc_challenge": 1119, "gsm8k": 7473, "aqua": 97467, "copa": 400,
        "sst2": 67349}  # fmt: skip
SECOND_STAGES = [name for name in RECIPES if name.endswith("_second_stage")]
IGU_RECIPES = [name for name in RECIPES if name.startswith("igu_lora") and name not in SECOND_STAGES]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The table of `examples/data` with the files that its script would write, empty."""
    table = json.loads((DATA / "dataset_info.json").read_text())
    return str(write_data_table(tmp_path_factory.mktemp("data"), table))


def settings_of(name):
    return yaml.safe_load(RECIPES[name].read_text())


def marks_of(name):
    """The origin that a recipe gives of each value; None without one."""
    lines = re.findall(r"^(\w+): [^#\n]*?(?:  # (paper|code|ours)\b.*)?$", RECIPES[name].read_text(), re.MULTILINE)
    assert len(lines) == len(settings_of(name)), "every key stands on one line"
    return {key: mark or None for key, mark in lines}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_all_checks_and_tells_the_origin_of_every_value_it_trains_with(name, data_dir, tmp_path):
    args = {**settings_of(name), "dataset_dir": data_dir}
    if "adaptive_plan" in args:  # which the first stage would have written
        args["adaptive_plan"] = str(tmp_path / "plan.json")
        Path(args["adaptive_plan"]).touch()
    config = parse_config(args)
    assert config.lora_rank == args["lora_rank"]
    HfArgumentParser(host._TRAIN_ARGS[3]).parse_dict(args, allow_extra_keys=True)
    unmarked = {key for key, mark in marks_of(name).items() if mark is None}
    assert unmarked <= {"output_dir", "logging_steps", "save_total_limit", "save_steps", "plot_loss", "report_to"}


def test_values_marked_as_the_papers_are_the_papers():
    assert set(RECIPES) == set(PAPER)
    for name, stated in PAPER.items():
        args = settings_of(name)
        assert {key: args[key] for key, mark in marks_of(name).items() if mark == "paper"} == stated, name


@pytest.mark.parametrize("name", IGU_RECIPES)
def test_igu_prunes_in_the_papers_epochs_and_is_evaluated_from_then_on(name, data_dir):
    args = {**settings_of(name), "dataset_dir": data_dir}
    held_out = math.ceil(args["val_size"] * ROWS[args["dataset"]]) if args["val_size"] < 1 else args["val_size"]
    batches = math.ceil((ROWS[args["dataset"]] - held_out) / args["per_device_train_batch_size"])
    epoch = math.ceil(batches / args["gradient_accumulation_steps"])
    total = math.ceil(epoch * args["num_train_epochs"])
    schedule = make_schedule(parse_config(args).search, total, 200, 100, epoch)
    assert schedule.end == args["eval_delay"]
    if name == "igu_lora_sst2_llama2":
        assert (schedule.begin, total - schedule.end, schedule.interval) == (100, 6000, 50)
        assert args["lora_rank"] == round(5234 / (32 * (4 + 3 * (1 + 5.42) / 2)))
        return
    assert (schedule.begin, schedule.end) == (2 * epoch, 5 * epoch)
    assert sum(schedule.due(step) for step in range(total)) == pytest.approx(15, abs=3), "five in each of three epochs"


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_a_second_stage_trains_on_the_ranks_of_its_first_and_differs_in_what_the_authors_script_does(name):
    first, second = settings_of(name.removesuffix("_second_stage")), settings_of(name)
    assert second["adaptive_plan"] == f"{first['output_dir']}/adaptive_rank_plan.json"
    batches = [run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] for run in (first, second)]
    assert batches == [32, 8]
    changed = {key for key in {**first, **second} if first.get(key) != second.get(key)}
    schedule = {"adaptive_init_rank", "adaptive_warmup_ratio", "adaptive_final_ratio", "adaptive_interval_epochs",
                "adaptive_min_rank", "adaptive_budget_unit", "igu_intervals", "eval_delay"}  # fmt: skip
    assert changed == schedule | {"adaptive_plan", "output_dir", "gradient_accumulation_steps"}
    assert not schedule & set(second)


def test_the_budget_of_igu_is_the_number_of_parameters_that_the_paper_reports():
    args = settings_of("igu_lora_boolq")
    hidden, keys, inner, layers = 896, 128, 4864, 24  # of Qwen2.5-0.5B
    per_rank = layers * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + inner))
    assert args["lora_target"] == "all"
    assert round(args["lora_rank"] * per_rank / 1e6, 1) == 8.8


def test_published_recipes_are_not_changed_by_newer_defaults():
    published = make_method("igu", {"variant": "published", "intervals": 20}).options
    for name in IGU_RECIPES:
        args = settings_of(name)
        given = {key.removeprefix("igu_"): value for key, value in args.items() if key.startswith("igu_")}
        assert make_method("igu", given).options == published


# -- the data, against the tasks that score it ------------------------------------------------------------------------


ARC = {"question": "2+2?", "choices": {"text": ["3", "4", "5"], "label": ["A", "B", "C"]}, "answerKey": "B"}
BOOLQ = {"question": "is water wet", "passage": "Water is wet.", "answer": True}
AQUA = {"question": "What is 3 x 7?", "options": ["A)20", "B) 24", "C)21", "D)18", "E)none"],
        "rationale": "A product.", "correct": "C"}  # fmt: skip
COPA = {"premise": "The man fell.", "choice1": "He slept.", "choice2": "It was icy.", "question": "cause", "label": 1}
READ = [
    ("boolq_no_passage", "boolq", BOOLQ, rows.boolq_row, "true"),
    ("boolq_no_passage", "boolq", {**BOOLQ, "answer": False, "question": "is it? "}, rows.boolq_row, "false"),
    ("arc_easy", "arc_easy", ARC, dict, "answer2"),
    ("arc_challenge", "arc_challenge", {**ARC, "answerKey": "C"}, dict, "answer3"),
    ("aqua", "aqua", AQUA, rows.aqua_row, "C"),
    ("copa", "copa", COPA, dict, "solution2"),
    ("copa", "copa", {**COPA, "question": "effect", "label": 0}, dict, "solution1"),
]


def rendered(template, row):
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(**row)


def tasks_config(protocol, task):
    return load_tasks(protocol, [task])[0].config


@pytest.mark.parametrize(("name", "task", "row", "as_asked", "answer"), READ)
def test_a_row_is_worded_as_the_task_asks_and_answered_as_the_task_reads(name, task, row, as_asked, answer):
    written = prepare.DATA_SETS[name].convert(row)
    config = tasks_config("llm_adapters", task)
    assert written["instruction"] == rendered(config["doc_to_text"], as_asked(row))
    assert written["output"] == rendered(config["doc_to_target"], as_asked(row))
    read = getattr(parsing, f"read_{task.removesuffix('_easy').removesuffix('_challenge')}")
    assert read(written["output"])["acc"] == answer


@pytest.mark.parametrize(("answer", "word"), [(True, "yes"), (False, "no")])
def test_boolq_with_its_passage_is_worded_as_lm_eval_asks_it(answer, word):
    row = {**BOOLQ, "answer": answer}
    written, config = prepare.boolq_row(row), tasks_config("lm_eval", "boolq")
    assert written["instruction"] == rendered(config["doc_to_text"], rows.boolq_row(row))
    assert written["output"] == word
    assert config["doc_to_choice"][int(answer)] == word


def test_recipes_train_in_the_prompt_of_the_evaluation():
    template = TEMPLATES["alpaca"]
    asked = template.default_system + template.format_user.slots[0].replace("{{content}}", "2+2?")
    assert asked == ALPACA.format(instruction="2+2?")
    assert {settings_of(name)["template"] for name in RECIPES} == {"alpaca"}


def test_a_sentence_is_asked_for_its_sentiment():
    written = prepare.sst2_row({"idx": 0, "sentence": "a fine film ", "label": 1})
    assert "Sentence: a fine film\n" in written["instruction"]
    assert written["output"] == "positive"
    assert prepare.sst2_row({"sentence": "dull", "label": 0})["output"] == "negative"


def test_every_set_that_is_prepared_is_in_the_table_and_has_a_licence_in_the_readme():
    table = json.loads((DATA / "dataset_info.json").read_text())
    assert {name: f"{name}_train.jsonl" for name in prepare.DATA_SETS} == {
        name: entry["file_name"] for name, entry in table.items() if "file_name" in entry
    }
    readme = (ROOT / "examples" / "README.md").read_text()
    assert all(re.search(rf"^\| `{name}` \|", readme, re.MULTILINE) for name in [*prepare.DATA_SETS, "gsm8k"])


def written_by(folder, names, out):
    prepare.prepare(names, folder, out)
    return sorted(path.name for path in out.glob("*"))


def test_local_rows_that_lack_the_passage_make_the_questions_alone(tmp_path, capsys):
    (tmp_path / "boolq").mkdir()
    row = {key: value for key, value in BOOLQ.items() if key != "passage"}
    (tmp_path / "boolq" / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert written_by(tmp_path, [], tmp_path / "out") == ["boolq_no_passage_train.jsonl"]
    said = capsys.readouterr().out
    assert re.search(r"^boolq is left out: the rows of .*train\.jsonl have no field passage$", said, re.MULTILINE)
    assert re.search(r"^copa is left out: there is no .*copa.train\.jsonl$", said, re.MULTILINE)
    assert "2 rows in" in said
    with pytest.raises(SystemExit, match=r"boolq cannot be written: the rows of .* have no field passage"):
        prepare.prepare(["boolq"], tmp_path, tmp_path / "out")


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_names_every_recipe_and_the_task_that_scores_it():
    page = (ROOT / "docs" / "papers.md").read_text()
    told = dict(re.findall(r"`(\w+)\.yaml` \| (?:`llm_adapters`, `(\w+)` )?", page))
    scored = {name: "" if name.endswith("llama2") else settings_of(name)["dataset"].removesuffix("_no_passage")
              for name in RECIPES}  # fmt: skip
    assert told == scored
    assert all(word in page.split("## What is out of reach")[1] for word in ("RoBERTa", "DeBERTa", "BART", "Conv1D"))


PUBLISHED_RATES = [name for name in RECIPES if "one of plain LoRA" in RECIPES[name].read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", PUBLISHED_RATES)
def test_rates_of_our_own_move_a_component_as_the_codes_rate_moves_one_of_plain_lora(name):
    """On Qwen2.5-0.5B, whose modules have 896 inputs but for down_proj."""
    settings = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    options = {key.removeprefix("igu_"): value for key, value in settings.items() if key.startswith("igu_")}
    slowdown = make_method("igu", options).initial_adapter.slowdown([ModuleShape("q_proj", 896, 896)])
    assert settings["learning_rate"] == pytest.approx(2e-4 * slowdown, rel=0.05)


def test_there_are_such_recipes():
    assert len(PUBLISHED_RATES) == 7
