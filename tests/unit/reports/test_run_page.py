"""The page of runs, without a browser: what is on it, and what is left out where files do not have it."""

import json
import re

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import CERTIFICATE_FILE, LOG_FILE
from llamafactory_adaptive.reports.data_page import data_page
from llamafactory_adaptive.reports.proofs import certificates, evaluations
from llamafactory_adaptive.reports.run_costs import cost_notes, cost_rows, run_costs
from llamafactory_adaptive.reports.run_page import html_report
from llamafactory_adaptive.reports.run_pictures import loss_picture
from llamafactory_adaptive.reports.run_report import read_run
from tests.helpers.plans import make_plan
from tests.helpers.runs import NASTY, save_run, save_whole_run


def test_nothing_that_others_wrote_becomes_markup(tmp_path):
    page = html_report([read_run(save_whole_run(tmp_path / "<b>x"))], {"<i>": NASTY})
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>x" not in page
    assert "<i>" not in page.replace("<i></i>", "")
    assert "&lt;script&gt;alert(1)" in page


def test_a_page_names_nothing_on_a_network(tmp_path):
    page = html_report([read_run(save_whole_run(tmp_path / "x", text="fine"))], {})
    links = {word for word in page.split('"') if "://" in word}
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, not addresses"
    assert "url(" not in page.replace("url(#", "")


def test_an_old_run_with_little_in_it_is_a_page_too(tmp_path):
    page = html_report([read_run(save_run(tmp_path / "out", history=[]))], {})
    assert "What came out" in page
    for missing in ("Losses", "Training data", "Certificate", "over the steps", "Side by side"):
        assert missing not in page
    assert html_report([], {"cut": "from 64 parameters"}).count("from 64 parameters") == 1


def test_what_was_asked_names_calibration_and_training_apart_as_far_as_the_run_tells(tmp_path):
    def asked(folder):
        page = html_report([read_run(folder)], {})
        return dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))

    plan = make_plan(provenance={"calibration_dataset": ["some", "more"]})
    earlier = asked(save_run(tmp_path / "earlier", plan))
    assert earlier["calibration data"] == "some, more"
    assert not {"data", "training data", "learning rate", "batch size"} & set(earlier)
    folder = save_run(tmp_path / "now", plan)
    training = {"dataset": ["one", "two"], "learning_rate": 1e-4, "batch_size": 8}
    with (folder / LOG_FILE).open("a") as log:
        log.write(json.dumps({"event": "end", "overhead_seconds": 4.0, "training": training}) + "\n")
    now = asked(folder)
    assert {key: now[key] for key in ("calibration data", "training data", "learning rate", "batch size")} == {
        "calibration data": "some, more", "training data": "one, two", "learning rate": "0.0001",
        "batch size": "8 rows a step"}  # fmt: skip


@pytest.mark.parametrize("training", ["x", [], {"dataset": "x", "learning_rate": "high", "batch_size": None}], ids=str)
def test_settings_of_another_shape_are_left_out(training, tmp_path):
    folder = save_run(tmp_path / "out")
    with (folder / LOG_FILE).open("a") as log:
        log.write(json.dumps({"event": "end", "overhead_seconds": 4.0, "training": training}) + "\n")
    assert "learning rate" not in html_report([read_run(folder)], {})


def test_a_plain_and_an_equal_run_have_no_differences_to_show(tmp_path):
    runs = [read_run(save_run(tmp_path / name)) for name in ("one", "two")]
    page = html_report(runs, {})
    assert "Side by side" in page
    assert "less those of" not in page


LOG = [
    {"overhead_seconds": 1.0, "peak_memory": {"host": 2**30}},
    {"overhead_seconds": 3.0, "overhead": {"planning": 1.0, "allocating": 2.0, "other": 5.0},
     "peak_memory": {"host": 2**31, "device": "much"}, "seconds": 19.0},
]  # fmt: skip


def test_the_ledger_gives_seconds_by_work_and_their_shares_of_the_whole_run():
    costs = run_costs(LOG, {"calibration_seconds": 0.5}, 10.0)
    figures = [(seconds, share) for _, seconds, share, _ in cost_rows(costs)]
    assert figures == [("1.00 s", "5.0%"), ("2.00 s", "10.0%"), ("3.00 s", "15.0%"), ("20.0 s", "")]
    assert cost_notes(costs) == [
        "of planning, 0.5 s were passes over the calibration rows",
        "peak of main memory: 1.00 GiB when training began, 2.00 GiB over the whole run",
    ]


def test_the_ledger_gives_the_memory_of_a_work_and_its_share_of_the_peak():
    def line(peak, origin="scored", **memory):
        work = {"planning": 1.0, "observing": 1.0, "allocating": 1.0}
        return {"overhead": work, "peak_memory": {"host": peak, "device": 2**32}, "memory": memory,
                "plan_origin": origin}  # fmt: skip

    plan = {"planning_seconds": 1.5, "calibration_peak_memory": {"host": 2**30}}

    def told(origin="scored", **more):
        before = line(2**31, origin, observing={"device": 2**30, "host": "much"}, scoring_samples=5)
        resumed = line(2**29, observing={"device": 2**20}, allocating={"host": 0})  # counts anew
        return [memory for *_, memory in cost_rows(run_costs([before, resumed], {**plan, **more}, 10.0))][:3]

    watched = ["statistics of 1.00 GiB on the device (25.0% of the run's peak)",
               "raised the peak by 0 KiB (0.0% of the run's peak)"]  # fmt: skip
    assert told() == ["peak of 1.00 GiB (50.0% of the run's peak)", *watched]
    assert told(statistics_reused=True) == told(planning_seconds=30.0) == told("re-used") == ["", *watched]
    assert told(calibration_peak_memory="much") == ["", *watched]
    # what scored in a process of its own took more than the training
    assert told(calibration_peak_memory={"host": 2**33})[0] == "peak of 8.00 GiB (100.0% of the run's peak)"


def test_the_ledger_of_an_earlier_version_has_the_sum_against_the_training():
    rows = cost_rows(run_costs([{"overhead_seconds": 2.0}], {"planning_seconds": 30.0}, 10.0))
    assert [row[1:] for row in rows] == [("2.00 s", "20.0%", ""), ("10.0 s", "", "")]
    assert cost_rows(run_costs([{}], {}, None)) == [("in all, which plain LoRA has not", "0.00 s", "", "")]
    assert "30.0 s when it was made" in cost_notes(run_costs([{}], {"planning_seconds": 30.0}, None))[0]


@pytest.mark.parametrize("text", ["[]", "{", '{"checks": 5}', '{"checks": [5]}', '{"scores": [{"headline": true}]}'])
def test_proofs_of_another_shape_are_left_out(tmp_path, text):
    for name in (CERTIFICATE_FILE, "eval_results.json"):
        (tmp_path / name).write_text(text)
    assert certificates(tmp_path) == evaluations(tmp_path) == []


def test_a_failed_check_is_one_of_the_whole_certificate_and_checkpoints_are_not_searched(tmp_path):
    checks = [{"name": "a", "passed": True}, {"name": "b", "passed": "yes"}]
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "served" / "vllm"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CERTIFICATE_FILE).write_text(json.dumps({"passed": True, "checks": checks}))
    found = certificates(tmp_path)
    assert [(proof["file"], proof["passed"]) for proof in found] == [
        (CERTIFICATE_FILE, False), (f"served/vllm/{CERTIFICATE_FILE}", False)]  # fmt: skip


@pytest.mark.parametrize("change", [{}, {"samples": "many"}, {"best": [5]}, {"distribution": [1]}], ids=str)
def test_a_data_report_of_another_shape_is_one_message(change):
    with pytest.raises(PlanError, match="cannot be shown"):
        data_page({"schema_version": 1, **change})


def test_a_long_curve_is_drawn_with_as_many_points_as_can_be_seen():
    short, long = (loss_picture([(i, 1.0 / (i + 1)) for i in range(n)], [], "x") for n in (400, 40_000))
    assert len(long) < 1.2 * len(short)
