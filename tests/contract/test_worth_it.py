"""What is shipped of a comparison: a small ledger from which its own code makes the same figures again."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.comparison.starts import changes, note_start
from llamafactory_adaptive.files import digest_of
from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.finished_comparison import OWN_KEYS, RIGHT, SPLIT, write_comparison


@pytest.fixture(scope="module")
def benchmarks():
    """The script and what it shares."""
    return import_benchmarks("shipped", "unfinished", "worth_it", "worth_it_rows", "report")


@pytest.fixture
def results(benchmarks, tmp_path, monkeypatch):
    """A folder for results in place of the repository's."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(benchmarks["unfinished"].record, "RESULTS", folder)
    return folder


def places(home):
    return {"<folder>": home / "kept", "<model>": home / "models" / "SmolLM2"}


def settings_on(home, seed):
    return {"settings": {"model_name_or_path": f"{home}/models/SmolLM2", "dataset_dir": f"{home}/kept/data",
                         "template": f"{home.parent}/here/kept_as_it_is", "seed": seed}, "rows": SPLIT}  # fmt: skip


def test_another_machine_goes_on_from_a_ledger_that_was_put_away(benchmarks, results, tmp_path):
    unfinished, (here, there) = benchmarks["unfinished"], (tmp_path / "here", tmp_path / "there")
    for home in (here, there):
        (home / "kept").mkdir(parents=True)
    ledger = Ledger(here / "kept" / "ledger.jsonl")
    for seed in (0, 1):
        ledger.add(settings_on(here, seed), {"status": "done", "dev": [0.5], "adapter": f"{here}/kept/runs/{seed}"})
    with ledger.path.open("a") as file:
        file.write('{"settings": {"seed": 2}, "resu')  # cut short by a kill
    note_start(here / "kept", {"arms": ["lora", "svd"], "eval-data": str(here / "data")})
    assert unfinished.put_away("x", here / "kept", lambda folder: places(here)) == 2
    text = (results / "x.unfinished.jsonl").read_text()
    assert f"{here}/kept/" not in text
    assert f"{here}/models" not in text
    assert str(here) not in (results / "x.unfinished.starts.json").read_text()

    own = Ledger(there / "kept" / "ledger.jsonl")
    own.add(settings_on(there, 1), {"status": "done", "dev": [0.7]})
    assert unfinished.bring_back("x", there / "kept", places(there)) == 1
    assert unfinished.bring_back("x", there / "kept", places(there)) == 0
    found = Ledger(there / "kept" / "ledger.jsonl")
    assert len(found.entries) == 2
    assert found.get(settings_on(there, 1))["dev"] == [0.7], "what a machine found itself stays"
    assert found.get(settings_on(there, 0))["adapter"] == f"{there}/kept/runs/0"
    starts = note_start(there / "kept", {"arms": ["lora"], "eval-data": str(there / "data")})
    assert changes(starts) == ["--arms was changed after the comparison had begun: lora,svd, then lora"]


def test_nothing_was_put_away(benchmarks, results, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*x\.unfinished\.jsonl to go on from"):
        benchmarks["unfinished"].bring_back("x", tmp_path, places(tmp_path))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_what_was_put_away_is_not_lost_by_another_folder(benchmarks, results, tmp_path):
    put_away = benchmarks["unfinished"].put_away
    for home, seeds in ((tmp_path / "first", (0, 1)), (tmp_path / "second", (1, 2))):
        ledger = Ledger(home / "kept" / "ledger.jsonl")
        for seed in seeds:
            ledger.add(settings_on(home, seed), {"status": "done", "dev": [float(seed)]})
        assert put_away("x", home / "kept", lambda folder: places(folder.parent)) == 2
    lines = [json.loads(line) for line in (results / "x.unfinished.jsonl").read_text().splitlines()]
    assert [line["result"]["dev"] for line in lines] == [[0.0], [1.0], [2.0]]
    before = (results / "x.unfinished.jsonl").read_bytes()
    (tmp_path / "ledger.jsonl").touch()
    for folder, said in ((None, "which --keep names"), (tmp_path / "none", "no run in"), (tmp_path, "no run in")):
        with pytest.raises(SystemExit, match=said):
            put_away("x", folder, places)
    assert (results / "x.unfinished.jsonl").read_bytes() == before
    assert [path.name for path in results.iterdir()] == ["x.unfinished.jsonl"], "written beside, and renamed"


@pytest.mark.parametrize("more", [[], ["--go-on"]])
def test_runs_that_were_put_away_are_taken_where_they_are_asked_for_alone(
    more, benchmarks, results, monkeypatch, tmp_path
):
    worth_it, unfinished = benchmarks["worth_it"], benchmarks["unfinished"]
    monkeypatch.setattr(worth_it.record, "smollm2", lambda: tmp_path / "model")
    away, folder, commands = tmp_path / "away", tmp_path / "mine", []
    Ledger(away / "ledger.jsonl").add({"dataset_dir": f"{away}/data"}, {"status": "done"})
    unfinished.put_away("worth_it_arc", away, worth_it.places)
    monkeypatch.setattr(worth_it, "parts", lambda *of: ({"train": [], "held_out": []}, "rows"))
    monkeypatch.setattr(worth_it.rows, "write", lambda *of: folder.mkdir(exist_ok=True))
    run = lambda words, check: commands.append(words) or Namespace(returncode=0)  # noqa: E731
    monkeypatch.setattr(worth_it.subprocess, "run", run)
    monkeypatch.setattr(worth_it.sys, "argv", ["worth_it.py", "arc", "--arms", "igo", "--keep", str(folder), *more])
    worth_it.main()
    assert ({"dataset_dir": f"{folder}/data"} in Ledger(folder / "ledger.jsonl")) == bool(more)
    (words,) = commands
    assert words[words.index("--arms") + 1] == "igo", "the command refuses what is no arm"


def test_too_few_rows_are_told_by_the_bound_that_they_miss(benchmarks, monkeypatch, tmp_path):
    worth_it = benchmarks["worth_it"]
    monkeypatch.setattr(worth_it.rows, "source", lambda *of: (tmp_path, "rows"))
    monkeypatch.setattr(worth_it.rows, "pairs", lambda *of: [])
    monkeypatch.setattr(worth_it.rows, "short", lambda *of: [("q", "a")] * 500)
    with pytest.raises(SystemExit, match="100 rows are left to train on, fewer than 200, half of those that are held"):
        worth_it.parts(worth_it.REGIMES["boolq"], None, tmp_path)
    with pytest.raises(SystemExit, match="20 rows are left to train on, and 800 are seen in 100 steps"):
        worth_it.parts(worth_it.REGIMES["capacity_limited"], None, tmp_path)


@pytest.fixture
def compared(benchmarks, tmp_path, monkeypatch):
    """A finished comparison, as the command leaves it, and its document."""
    monkeypatch.setattr(benchmarks["shipped"], "_own_keys", lambda given: OWN_KEYS)
    return tmp_path, write_comparison(tmp_path)


def test_the_shipped_ledger_holds_every_run_and_no_path_and_gives_the_figures_of_the_command(benchmarks, compared):
    folder, made = compared
    held, lines = benchmarks["shipped"].from_folder(folder, "model")
    assert len(lines) == 3 * 3 + 3 * 3, "two rates and one beyond, and three seeds that judge, for each of three arms"
    assert "/home/me" not in json.dumps([held, lines])
    assert held["modules"] == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    for entry, told in zip(held["comparison"]["arms"], made["arms"], strict=True):
        assert entry == {key: value for key, value in told.items() if key != "ranks"}
    assert [entry["best"]["rate"] for entry in held["comparison"]["arms"]] == [4.0] * 3


def test_a_figure_that_the_ledger_does_not_give_is_found(benchmarks, compared, tmp_path, monkeypatch):
    shipped = benchmarks["shipped"]
    held, lines = shipped.from_folder(compared[0], "model")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    monkeypatch.setattr(shipped.record, "RESULTS", tmp_path)
    (tmp_path / "worth_it_x.json").write_text(json.dumps(held))
    shipped.ledger_file("worth_it_x").write_text(text)
    held, entries = shipped.read("worth_it_x")
    fresh = shipped.recomputed(held, entries)
    assert fresh["arms"][2]["ranks"] == {"model.layers.0.q_proj": 1.0}
    assert shipped.different(shipped.without_ranks(fresh), held["comparison"]) == []
    held["comparison"]["arms"][2]["loss"] += 0.001
    (said,) = shipped.different(shipped.without_ranks(fresh), held["comparison"])
    assert said.startswith("/arms/2/loss: ")
    # What is no longer in the ledger is missed, not taken from the record.
    choosing = next(key for key, entry in entries.items() if "random" in key)
    for kept in ({key: entry for key, entry in entries.items() if key != choosing}, {}):
        assert shipped.different(shipped.without_ranks(shipped.recomputed(held, kept)), held["comparison"])


def test_answers_are_shipped_and_give_the_accuracies_and_verdicts_of_the_command(benchmarks, monkeypatch, tmp_path):
    shipped = benchmarks["shipped"]
    monkeypatch.setattr(shipped, "_own_keys", lambda given: OWN_KEYS)
    made = write_comparison(tmp_path, tasks=True)
    held, lines = shipped.from_folder(tmp_path, "model")
    assert held["comparison"]["tasks"] == made["tasks"]
    answered = [line for line in lines if "answers" in line["result"]]
    assert [(line["settings"]["arm"], line["settings"]["seed"]) for line in answered] == [
        (arm, seed) for arm in RIGHT for seed in (1, 2, 3)
    ]
    assert answered[0]["result"]["answers"] == {"boolq": [1] * 10 + [0] * 10}
    entries = {json.dumps(line["settings"], sort_keys=True): line["result"] for line in lines}
    for line in answered[:3]:  # a question that plain LoRA answered wrongly is told to be right
        line["result"]["answers"]["boolq"][-1] = 1
    fresh = shipped.recomputed(held, entries)["tasks"]["arms"]
    assert [arm["accuracy"]["boolq"]["value"] for arm in fresh] == [0.55, 0.5, 1.0]
    assert fresh[2]["verdicts"]["boolq"]["lora"]["difference"]["value"] == pytest.approx(0.45)


def test_answers_of_two_budgets_stand_beside_each_other(benchmarks):
    def result(rank, *arms):
        tasks = {"questions": {"boolq": 20}, "commonest_answer": {"boolq": 0.1 * rank}, "arms": list(arms)}
        return {"rank": rank, "comparison": {"tasks": tasks}}

    def arm(name, value, verdicts=None):
        return {"name": name, "accuracy": {"boolq": {"value": value}}, "verdicts": verdicts or {}}

    against = {"boolq": {"lora": {"difference": {"value": -0.0004}, "verdict": "equivalent"}}}
    maker = benchmarks["report"].page_maker()
    lines = maker._accuracies([
        result(8, arm("lora", 0.5), {"name": "igu", "failed": "no room"}),
        result(1, arm("lora", 0.4), arm("svd", 0.4, against)), {"rank": 2, "comparison": {}},
    ])  # fmt: skip
    assert list(lines) == [
        "\n| accuracy against plain LoRA | boolq, rank 8 | boolq, rank 1 |", "| --- | --- | --- |",
        "| lora | 50.0 % | 40.0 % |", "| igu | could not be evaluated |  |", "| svd |  | +0.0 points, equivalent |",
        "| always the commonest answer | 80.0 % | 10.0 % |",
    ]  # fmt: skip


def test_answers_are_known_by_a_run_on_another_machine(benchmarks, results, tmp_path):
    unfinished, (here, there) = benchmarks["unfinished"], (tmp_path / "here", tmp_path / "there")
    for home in (here, there):
        (home / "kept").mkdir(parents=True)
    ledger = Ledger(here / "kept" / "ledger.jsonl")
    ledger.add(settings_on(here, 1), {"status": "done"})
    ledger.add({"run": digest_of(settings_on(here, 1)), "questions": {}}, {"answers": {}})
    assert unfinished.put_away("x", here / "kept", lambda folder: places(here)) == 2
    assert unfinished.bring_back("x", there / "kept", places(there)) == 2
    found = Ledger(there / "kept" / "ledger.jsonl")
    assert found.get({"run": digest_of(settings_on(there, 1)), "questions": {}}) == {"answers": {}}


def test_a_path_in_the_words_of_a_failed_arm_is_not_shipped(benchmarks, compared):
    folder, made = compared
    made["command"] = "x"
    made["notes"] = ["it failed (its log: /home/me/runs/logs/a.log), see https://a.b/c/d and 1/2"]
    (folder / "compare.json").write_text(json.dumps(made))
    held, _ = benchmarks["shipped"].from_folder(folder, "model")
    assert held["comparison"]["notes"] == ["it failed (its log: <path>), see https://a.b/c/d and 1/2"]


def test_rows_are_asked_as_the_harness_asks_them(benchmarks, tmp_path):
    rows, lines = benchmarks["worth_it_rows"], {
        "boolq": {"question": "is water wet?", "answer": True},
        "arc_easy": {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        "gsm8k": {"question": "1 + 1?", "answer": "2\u2028#### 2"},
    }  # fmt: skip
    for name, row in lines.items():
        (tmp_path / name).mkdir()
        line = json.dumps(row, ensure_ascii=False) + "\n"
        (tmp_path / name / "train.jsonl").write_text(2 * line, encoding="utf-8")
    assert dict(rows.pairs(tmp_path, list(lines))) == {
        "Please answer the following question with true or false, question: is water wet?\n\n"
        "Answer format: true/false": "the correct answer is true",
        "Please choose the correct answer to the question: Which?\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2": "the correct answer is answer2",
        "1 + 1?": "2\u2028#### 2",
    }  # fmt: skip


def test_a_regime_with_an_evaluation_environment_asks_its_own_tasks(benchmarks, monkeypatch, tmp_path):
    worth_it = benchmarks["worth_it"]
    monkeypatch.delenv("ADAPTIVE_BENCH_DATA", raising=False)
    regime = worth_it.REGIMES["arc"]
    words = worth_it.words_for_tasks(regime, Namespace(eval_python=Path("py"), data=str(tmp_path)))
    assert words[:6] == ["--tasks", "arc_easy,arc_challenge", "--eval-python", "py", "--eval-data", str(tmp_path)]
    assert worth_it.words_for_tasks(regime, Namespace(eval_python=None, data=None)) == []
    with pytest.raises(SystemExit, match="asks the questions of --data, which is missing"):
        worth_it.words_for_tasks(regime, Namespace(eval_python=Path("py"), data=None))


RECORDED = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks" / "results").glob("worth_it_*.json"))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_figures_are_those_of_the_ledger(benchmarks, name):
    assert benchmarks["report"].checked(name)["arms"]


FACTS = {"regime": "capacity_limited", "data": "gsm8k", "longest_row": 180, "rank": 1, "steps": 4, "batch_size": 2,
         "device": "cpu", "date": "2026-01-01", "command": "python benchmarks/worth_it.py"}  # fmt: skip


def test_the_report_writes_pages_from_a_result_and_refuses_a_figure_of_another_ledger(
    benchmarks, tmp_path, monkeypatch, capsys
):
    shipped, report = benchmarks["shipped"], benchmarks["report"]
    monkeypatch.setattr(shipped, "_own_keys", lambda given: OWN_KEYS)
    write_comparison(tmp_path, tasks=True)
    held, lines = shipped.from_folder(tmp_path, "model")
    monkeypatch.setattr(shipped.record, "RESULTS", tmp_path)
    shipped.ledger_file("worth_it_x").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "worth_it_x.json").write_text(json.dumps({**FACTS, **held}))
    maker = report.page_maker()
    maker.RESULTS, maker.IMAGES, maker.README, maker.PAGE = tmp_path, tmp_path, tmp_path / "R.md", tmp_path / "W.md"
    maker.README.write_text("\n".join(["# x", *maker.MARKS, "end"]))
    monkeypatch.setattr(report, "page_maker", lambda: maker)
    report.main()
    assert "1 recorded comparisons agree with their ledgers" in capsys.readouterr().out
    assert (tmp_path / "worth_it_x_ranks.svg").read_text().startswith("<svg")
    loss = held["comparison"]["arms"][2]["loss"]
    assert f"| igu | 4 (end of the grid) | {loss:.4f} | " in maker.PAGE.read_text()
    rows = "4 steps of 2 rows of gsm8k of at most 180 tokens, where a module may have no adapter, 9 in all; 30"
    assert f"{rows} held-out rows choose" in maker.PAGE.read_text()
    difference = held["comparison"]["arms"][2]["verdicts"]["lora"]
    cell = f"| igu | {100 * difference['difference']['relative']['value']:+.2f} %, {difference['verdict']} |"
    assert cell in maker.README.read_text()
    assert "| lora | 50.0 % |\n| random | +0.0 points, not decided |\n| igu | +50.0 points, better |" in (
        maker.README.read_text()
    )
    answered = maker.PAGE.read_text().partition("### Answers: boolq, 20 questions, acc\n")[2]
    assert "\n| igu | 100.0 % ± 0.0 | +50.0 ± " in answered
    assert "\nProtocol llm_adapters, the first 20 questions of each task; " in answered
    assert "\n* all: a note\n" in answered
    other = {half: [1] * 30 for half in ("dev", "test")}
    (tmp_path / "worth_it_x.json").write_text(json.dumps({**FACTS, **held, "answer_tokens": other}))
    with pytest.raises(SystemExit, match="worth_it_x: the ledger gives other figures: "):
        report.main()
