"""From outcomes of runs to verdicts and pages: no training."""

import json
import re

import numpy as np
import pytest

from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.comparison.pages import sentences, table, text_table, write_pages
from llamafactory_adaptive.comparison.rank_pictures import layer_pictures, rank_cells
from llamafactory_adaptive.comparison.results import (
    arm_results,
    budget,
    budget_words,
    document,
    mean_ranks,
    ranks_by_module,
)


TOKENS = {"dev": [5] * 60, "test": [4, 6] * 30}
ARMS = ("lora", "random", "igu", "dora", "hot", "<b>odd</b>", "late", "shaky")
GAIN = {"igu": -0.2, "dora": 0.0, "random": 0.3}  # in nats, of a loss of about 2


def outcome(run):
    """Losses with noise of rows and seeds that arms share, so that differences are exact to a hundredth or so."""
    if run.arm == "hot" or (run.arm == "shaky" and run.point.rate == 2.0 and run.seed == 2):
        return {"status": "diverged"}
    if run.arm == "late" and run.seed > 3:
        return None
    shared = np.random.default_rng(run.seed).normal(2.0, 0.2, 60)
    own = np.random.default_rng((run.seed, ARMS.index(run.arm))).normal(0.0, 0.01, 60)
    losses = (shared + own + GAIN.get(run.arm, 0.0) + abs(run.point.rate - 2.0)).tolist()
    parameters = {"dora": 1100, "igu": 996}.get(run.arm, 1000)
    return {"status": "done", "dev": losses, "test": losses, "seconds": 30.0, "parameters": parameters,
            "parameters_of_one_rank": 10, "ranks": {"model.layers.0.q_proj": 4, "model.layers.1.q_proj": 2,
                                                    "model.layers.1.up_proj": 8}}  # fmt: skip


@pytest.fixture(scope="module")
def progress():
    arms = [Arm(name, {"finetuning_type": "lora", "hub_token": "hf_1"}) for name in (*ARMS, "broken")]
    design = Design((1.0, 2.0, 4.0), seeds=5, extensions=0)
    made = Progress(design, arms, lambda run: None if run.arm == "broken" else outcome(run),
                    lambda found, half: np.mean(found[half]))  # fmt: skip
    made.failed |= {"broken": "out of memory", "late": "killed"}
    return made


@pytest.fixture(scope="module")
def made(progress):
    facts = {"command": "llamafactory-adaptive compare x.yaml", "design": {"seeds": 5},
             "changed": ["--effect was changed after the comparison had begun: 0.5%, then 2%"]}  # fmt: skip
    return document(arm_results(progress), TOKENS, 0.005, facts)


def arm(made, name):
    return next(entry for entry in made["arms"] if entry["name"] == name)


def test_arms_are_judged_at_their_best_rate_against_plain_lora_and_random_ranks(made):
    assert arm(made, "igu")["best"] == {"rate": 2.0, "alpha": None}
    verdicts = {name: arm(made, name)["verdicts"]["lora"]["verdict"] for name in ("igu", "random", "dora")}
    assert verdicts == {"igu": "better", "random": "worse", "dora": "equivalent"}
    assert arm(made, "igu")["verdicts"]["random"]["verdict"] == "better"
    relative = arm(made, "igu")["verdicts"]["lora"]["difference"]["relative"]
    assert relative["value"] == pytest.approx(-0.2 / 2.0, rel=0.05)
    assert arm(made, "lora")["verdicts"] == {}


def test_the_loss_of_a_seed_is_the_mean_over_answer_tokens(made):
    rows = np.array(outcome(type("R", (), {"arm": "igu", "seed": 3, "point": type("P", (), {"rate": 2.0})}))["test"])
    assert arm(made, "igu")["seeds"] == [1, 2, 3, 4, 5], "seed 0 chose the rate"
    assert arm(made, "igu")["losses"][2] == pytest.approx(np.average(rows, weights=TOKENS["test"]))


def test_an_adapter_of_another_size_is_told_and_one_that_lacks_less_than_a_rank_is_equal(made):
    plain = arm(made, "lora")
    assert arm(made, "igu")["equal_parameters"] is True
    assert budget_words(arm(made, "igu"), plain) is None
    assert budget_words(arm(made, "dora"), plain) == "dora saves 10.0% more parameters than plain LoRA"


def test_ranks_are_averaged_by_module_type():
    assert mean_ranks([outcome(type("R", (), {"arm": "lora", "seed": 0, "point": type("P", (), {"rate": 2.0})}))]) == {
        "q_proj": 3.0, "up_proj": 8.0}  # fmt: skip


def test_ranks_of_a_module_are_averaged_over_seeds_in_the_order_of_the_model():
    finals = [{"ranks": {"layers.10.q_proj": 4, "layers.2.q_proj": 1}}, {"ranks": {"layers.10.q_proj": 2}}]
    assert list(ranks_by_module(finals).items()) == [("layers.2.q_proj", 0.5), ("layers.10.q_proj", 3.0)]


def test_experts_of_a_layer_share_a_cell_and_equal_ranks_need_no_picture():
    ranks = {"layers.1.experts.0.up": 1.0, "layers.1.experts.1.up": 2.0, "head": 4.0}
    assert rank_cells(ranks) == {(1, "up"): 1.5, (-1, "head"): 4.0}
    assert layer_pictures([{"name": "lora", "ranks": dict.fromkeys(ranks, 8.0)}]) is None
    arms = {"lora": dict.fromkeys(ranks, 2.0), "igu": ranks, "without": {"head": 2.0}}
    drawn = layer_pictures([{"name": name, "ranks": each} for name, each in arms.items()])
    assert [name for name in arms if f">{name}<" in drawn] == ["igu", "without"]


def test_arms_that_diverged_or_could_not_run_are_told(made):
    rows = {row[0]: row for row in table(made)}
    assert rows["hot"][1] == "diverged at every rate"
    assert rows["broken"][1] == "could not be run: out of memory"
    assert any(sentence.startswith("hot: diverged") for sentence in sentences(made))
    assert len(text_table(made)) == 1 + len(made["arms"])


def test_what_makes_a_result_less_certain_is_told(made):
    said = sentences(made)
    assert "late: judged by 3 of 5 seeds, as a run could not be made: killed" in said
    assert "shaky: 2 was left out, as a run with one of the seeds that judge diverged there" in said
    assert "the best rate is the end of the grid for shaky: a better one may lie beyond" in said
    assert said[-1] == "--effect was changed after the comparison had begun: 0.5%, then 2%"
    assert arm(made, "late")["seeds"] == [1, 2, 3]
    assert arm(made, "late")["verdicts"]["lora"]["difference"]["seeds"] == 3
    assert arm(made, "shaky")["unstable"] == [{"rate": 2.0, "alpha": None}]


def test_a_seed_that_ends_far_above_the_others_is_named(made):
    def said(*losses):
        entry = {**arm(made, "igu"), "losses": list(losses), "seeds": [1, 2, 3][: len(losses)]}
        return [each for each in sentences({**made, "arms": [arm(made, "lora"), entry]}) if "median" in each]

    (told,) = said(0.1, 1.0386, 0.11)
    assert told.startswith("igu: seed 2 ended at a loss of 1.0386, where the median of the seeds is 0.1100: ")
    assert said(0.1, 0.14, 0.11) == said(0.1, 1.0) == []


def test_an_alpha_at_the_end_of_its_grid_is_told():
    arms = [Arm(name, {"finetuning_type": "lora"}) for name in ("lora", "random")]
    design = Design((1.0, 2.0, 4.0), alphas=(8.0, 16.0), seeds=2)
    progress = Progress(design, arms, outcome, lambda found, half: np.mean(found[half]))
    said = sentences(document(arm_results(progress), TOKENS, 0.005, {"design": {"seeds": 2}}))
    assert "the best alpha is the end of the grid for lora, random: a better one may lie beyond" in said


def test_arms_without_a_seed_in_common_are_not_compared_with_each_other():
    arms = [Arm(name, {"finetuning_type": "lora"}) for name in ("lora", "random", "igu")]
    seeds = {"random": (0, 1, 2), "igu": (0, 3)}
    progress = Progress(Design((2.0,), seeds=3, extensions=0), arms,
                        lambda run: outcome(run) if run.seed in seeds.get(run.arm, range(4)) else None,
                        lambda found, half: np.mean(found[half]))  # fmt: skip
    progress.failed |= {"random": "killed", "igu": "killed"}
    judged = arm(document(arm_results(progress), TOKENS, 0.005, {"design": {"seeds": 3}}), "igu")["verdicts"]
    assert list(judged) == ["lora"]


def test_without_a_run_of_plain_lora_budgets_are_not_compared(progress):
    results = {result.arm.name: result for result in arm_results(progress)}
    assert budget(results["igu"], results["hot"]) == {"parameters": 996, "equal_parameters": None}
    assert budget_words({"name": "igu", "equal_parameters": None}, {}) is None


def test_secrets_of_an_arm_reach_no_page(made):
    assert "hf_1" not in json.dumps(made)


def test_pages_are_self_contained_and_show_names_as_text(made, tmp_path):
    paths = {path.suffix: path.read_text() for path in write_pages(made, tmp_path)}
    assert json.loads(paths[".json"]) == json.loads(json.dumps(made))
    html = paths[".html"]
    assert "<b>odd" not in html
    assert "&lt;b&gt;odd" in html
    assert html.count("<svg") == 5
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,12})""", html)
    assert {address.partition(":")[0] if ":" in address else address[:1] for address in addresses} <= {"#", "data"}
    assert "<script" not in html
    assert "<b>odd" not in paths[".md"]
    for sentence in sentences(made)[:1]:
        assert sentence.partition(":")[0] in paths[".md"]
