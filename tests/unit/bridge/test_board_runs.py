"""What the board does without its components: its seams, edited plans, finished runs, exports, a run that trains."""

import json
import types
from pathlib import Path

import pytest


pytest.importorskip("gradio")
from llamafactory.webui import engine, interface, runner  # applies the seams
from llamafactory.webui.chatter import WebChatModel
from llamafactory.webui.components.export import save_model
from llamafactory.webui.control import list_checkpoints

from llamafactory_adaptive.bridge import seam, seams
from llamafactory_adaptive.bridge.board.command import Progress
from llamafactory_adaptive.bridge.board.exporting import export
from llamafactory_adaptive.bridge.board.ranks_tab import _shown
from llamafactory_adaptive.bridge.board.run_folders import finished_runs
from llamafactory_adaptive.bridge.board.seams import BOARD_SEAMS, INTERFACE
from llamafactory_adaptive.bridge.board.training_figure import ranks_so_far, with_ranks
from llamafactory_adaptive.files import CERTIFICATE_FILE, LOG_FILE, PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.plans import found_plan, make_plan
from tests.helpers.runs import save_run


assert interface.__name__ == INTERFACE


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """The working folder of the board."""
    folder = tmp_path_factory.mktemp("board")
    monkeypatch.chdir(folder)
    return folder


def test_an_export_is_shown_with_its_certificate(folder, tmp_path):
    words = []

    class Exporting:
        def run(self, given):
            words.extend(given)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / CERTIFICATE_FILE).write_text('{"passed": true}')
            yield Progress(1, "", "comparing")
            yield Progress(2, "written", "", 0)

    *_, done = export(Exporting(), Path("-run"), "vllm", f" {tmp_path}/out ", " tiny ", "en")
    assert words == ["export", "./-run", "--for=vllm", f"--out={tmp_path}/out", "--base=tiny"]
    assert done["certificate"].value == {"passed": True}
    assert done["export_status"].startswith("Exported and certified in 2 s")


# -- seams ------------------------------------------------------------------------------------------------------------


def test_a_board_that_does_not_fit_stays_as_it_is_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(seams, "_applied", set())
    monkeypatch.setattr(seams, "_misfits", {})
    monkeypatch.setattr(seam.logger, "propagate", True)
    monkeypatch.setattr(runner, "get_trainer_info", None)
    module = types.ModuleType(INTERFACE)
    module.create_train_tab = module.create_footer = print
    with caplog.at_level("WARNING"):
        seams.apply_seams(module)
    assert module.create_train_tab is module.create_footer is print
    assert len(caplog.records) == 1
    assert "LLaMA Board does not offer adaptive ranks" in caplog.text
    assert "llamafactory.webui.runner.get_trainer_info looks different" in caplog.text


def test_the_board_fits_the_installed_version():
    states = seams.seam_states(optional=True)
    assert {states[seam.target] for seam in BOARD_SEAMS} == {"fits"}


def test_runs_do_without_the_board(monkeypatch):
    assert all(seam.optional for seam in BOARD_SEAMS)
    monkeypatch.setitem(seams._misfits, BOARD_SEAMS[0].target, "looks different")
    seams.require_seams()
    assert seams.seam_states(optional=True)[BOARD_SEAMS[0].target] == "looks different"


# -- plans and runs ---------------------------------------------------------------------------------------------------


def test_the_demo_board_opens_saved_runs_alone(folder, tmp_path):
    inside = save_run(folder / "saves" / "Custom" / "adaptive" / "one")
    outside = save_run(tmp_path / "other")
    (inside.parent / "link").symlink_to(outside)
    assert finished_runs() == ["saves/Custom/adaptive/one"]
    seen = "saves/Custom/adaptive/one"
    assert 'class="heat' in _shown(seen, None, "en", True)[0]
    for path in (str(outside), "saves/Custom/adaptive/link", "saves/../../etc"):
        assert "Only runs in the folder saves" in _shown(path, None, "en", True)[0]
        assert "Only runs in the folder saves" in _shown(seen, path, "en", True)[0]
    assert 'class="heat' in _shown(str(outside), None, "en", False)[0]
    assert "Choose a finished run" in _shown(None, None, "en", False)[0]


def test_two_runs_are_compared_and_texts_are_escaped(folder, tmp_path):
    one = save_run(tmp_path / "<img src=x onerror=alert(1)>")
    other = save_run(tmp_path / "other", plan=make_plan(ranks=(5, 3)))
    view, _ = _shown(str(one), str(other), "de", False)
    assert "<img" not in view
    assert "&lt;img" in view
    assert "Difference in rank" in view
    assert "rank 3 here, 5 there" in view


def test_of_runs_with_other_modules_no_differences_are_drawn(folder, tmp_path):
    one, other = save_run(tmp_path / "one"), save_run(tmp_path / "other", plan=found_plan())
    view, _ = _shown(str(one), str(other), "en", False)
    assert "The two runs have ranks for different modules" in view
    assert "Comparison" in view
    assert " here, " not in view


def test_a_run_that_is_removed_meanwhile_is_not_listed(folder, monkeypatch):
    kept = save_run(folder / "saves" / "Custom" / "adaptive" / "kept").relative_to(folder)
    monkeypatch.setattr(Path, "glob", lambda *_: [kept / PLAN_FILE, kept.with_name("gone") / PLAN_FILE])
    assert finished_runs() == [str(kept)]


def test_a_run_that_still_trains_is_not_listed_and_told_when_asked_for(folder):
    ended = save_run(folder / "saves" / "Custom" / "adaptive" / "ended").relative_to(folder)
    trains = ended.with_name("trains")
    make_plan().save(trains / PLAN_FILE)
    assert finished_runs() == [str(ended)]
    for chosen, beside in ((trains, None), (ended, trains)):
        shown, _ = _shown(str(chosen), beside and str(beside), "en", False)
        assert f"{trains} still trains or was broken off" in shown


def test_a_plan_outside_the_working_folder_can_be_downloaded_too(folder, tmp_path):
    elsewhere = tmp_path / "disk" / "Custom" / "adaptive" / "one"
    save_run(elsewhere)
    (folder / "saves").symlink_to(tmp_path / "disk")
    _, button = _shown("saves/Custom/adaptive/one", None, "en", False)
    assert button.visible
    assert load_plan(Path(button.value["path"])).digest() == load_plan(elsewhere / PLAN_FILE).digest()
    (copy,) = (folder / "llamaboard_cache").rglob(PLAN_FILE)
    assert load_plan(copy).digest() == load_plan(elsewhere / PLAN_FILE).digest(), "where the board may serve it"


def test_no_run_is_told_and_not_raised(folder, tmp_path):
    assert "there is no run in" in _shown(str(tmp_path), None, "en", False)[0]


# -- adapters, as the host's own tabs look for them -------------------------------------------------------------------


CHOSEN = {
    "top.lang": "en", "top.model_name": "Custom", "top.model_path": "tiny", "top.finetuning_type": "adaptive",
    "top.checkpoint_path": ["one"], "top.quantization_bit": "none", "top.quantization_method": "bnb",
    "top.template": "default", "top.rope_scaling": "none", "top.booster": "auto",
    "eval.dataset_dir": "data", "eval.dataset": ["tiny"], "eval.cutoff_len": 8, "eval.max_samples": "8",
    "eval.batch_size": 1, "eval.max_new_tokens": 8, "eval.top_p": 1, "eval.temperature": 1,
    "eval.output_dir": "scored", "eval.predict": True,
    "eval.eval_seed": "42",  # of LLaMA-Factory's main branch
    "infer.extra_args": "{}", "infer.infer_backend": "huggingface", "infer.infer_dtype": "auto",
}  # fmt: skip
NAMES = types.SimpleNamespace(get_elem_by_id=str)  # data by the names of components


def test_checkpoints_of_adaptive_runs_are_listed_and_several_can_be_chosen(folder):
    adapter = folder / "saves" / "Custom" / "adaptive" / "one"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").touch()
    listed = list_checkpoints("Custom", "adaptive")
    assert listed.choices == [("one", "one")]
    assert listed.multiselect is True


def test_evaluation_chat_and_export_are_given_the_adapter(folder, monkeypatch):
    taken = [engine.Runner(NAMES)._parse_eval_args(CHOSEN)]
    assert taken[0]["output_dir"] == "saves/Custom/adaptive/scored"
    monkeypatch.setattr("llamafactory.webui.chatter.ChatModel.__init__", lambda _, args: taken.append(args))
    list(WebChatModel(NAMES).load_model(CHOSEN))
    monkeypatch.setattr("llamafactory.webui.components.export.export_model", taken.append)
    list(save_model("en", "Custom", "tiny", "adaptive", ["one"], "default", 5, "none", "", "cpu", False, "merged", "",
                    "{}"))  # fmt: skip
    assert [args["adapter_name_or_path"] for args in taken] == ["saves/Custom/adaptive/one"] * 3
    assert {(args["finetuning_type"], args["model_name_or_path"]) for args in taken} == {("adaptive", "tiny")}


# -- while a run trains -----------------------------------------------------------------------------------------------


def test_the_figure_of_a_run_has_its_ranks_on_a_second_axis(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("llamafactory_adaptive.bridge.board.training_figure.gr.Plot", figures.append)
    entries = [{"loss": 2.0 - step / 10, "current_steps": step, "total_steps": 4} for step in (1, 2, 3)]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    names = [module.name for module in make_plan().modules]
    lines = [{"event": "begin", "step": 0, "modules": names, "ranks": [8, 8]}, {"step": 2, "ranks": [3, 5]}]
    (tmp_path / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def info(*_):
        return "log", "progress", {"loss_viewer": "the host's"}

    with_ranks(info)("en", str(tmp_path), True)
    loss, ranks = figures[0].axes
    assert list(loss.lines[0].get_ydata()) == [1.9, 1.8, 1.7]
    (line,) = ranks.lines
    assert line.get_label() == "up_proj"
    assert list(line.get_xdata()) == [0, 2, 3]
    assert list(line.get_ydata()) == [8.0, 4.0, 4.0]


def test_a_plan_that_stays_is_a_level_line_and_other_runs_have_none(tmp_path):
    assert ranks_so_far(tmp_path) is None
    make_plan().save(tmp_path / PLAN_FILE)
    assert ranks_so_far(tmp_path).means == {"up_proj": (4.0,)}
    (tmp_path / PLAN_FILE).write_text("{")
    assert ranks_so_far(tmp_path) is None
    plain = ("log", "progress", {"loss_viewer": "the host's"})
    assert with_ranks(lambda *_: plain)("en", str(tmp_path), True) == plain
