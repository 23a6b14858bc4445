"""The board as it is built, without a browser: components, what events get, what its runner makes of them."""

import json
from pathlib import Path

import pytest
import yaml


pytest.importorskip("gradio")
from llamafactory.webui import interface, runner

from llamafactory_adaptive.bridge.board import labels
from llamafactory_adaptive.bridge.board.command import BusyError, Progress
from llamafactory_adaptive.bridge.board.option_fields import option_fields
from llamafactory_adaptive.files import PLAN_FILE
from tests.helpers.plans import make_plan


BLANK = {field.key: field.blank for field in option_fields()}
KEYS = set(BLANK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of the board, which writes its cache there."""
    folder = tmp_path_factory.mktemp("board")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def built(folder):
    return interface.create_ui()


@pytest.fixture(scope="module")
def config(built):
    return built.get_config_file()


@pytest.fixture(scope="module")
def engine(built):
    return _engine(built)


def _engine(built):
    (found,) = {fn.fn.__self__ for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == "change_lang"}
    return found


@pytest.fixture
def held(engine):
    """What the components of the Train tab hold for an adaptive run of a tiny model."""
    data = {element: getattr(element, "value", None) for element in engine.manager.get_elem_list()}
    given = {
        "top.lang": "en", "top.model_name": "Custom", "top.model_path": "tiny", "top.finetuning_type": "adaptive",
        "top.checkpoint_path": [], "train.dataset": ["tiny_sft"], "train.output_dir": "mine", "train.lora_rank": 4,
        "train.config_path": "mine.yaml", "train.lora_target": "", "train.additional_target": "",
        "train.freeze_extra_modules": "",
    }  # fmt: skip
    return data | {engine.manager.get_elem_by_id(name): value for name, value in given.items()}


def change(engine, data, **values):
    return data | {engine.manager.get_elem_by_id(f"adaptive.{key}"): value for key, value in values.items()}


def components(config, **wanted):
    return [c for c in config["components"] if all(c["props"].get(key) == value for key, value in wanted.items())]


# -- components -------------------------------------------------------------------------------------------------------


def test_adaptive_can_be_picked_and_every_option_has_a_component(config):
    assert components(config, choices=[(kind, kind) for kind in ("full", "freeze", "lora", "oft", "adaptive")])
    ids = [component["props"].get("elem_id") for component in config["components"]]
    assert set(ids) >= KEYS
    assert len(KEYS) == sum(name in KEYS for name in ids)


def test_the_panel_is_hidden_at_first_and_stands_among_the_hosts_boxes(config, engine, built):
    (panel,) = components(config, elem_id="adaptive_panel")
    assert panel["props"]["visible"] is False
    siblings = engine.manager.get_elem_by_id("adaptive.adaptive_panel").parent.children
    after = siblings.index(engine.manager.get_elem_by_id("adaptive.adaptive_panel")) + 1
    assert siblings[after] is engine.manager.get_elem_by_id("train.extra_tab")


def test_the_tab_of_ranks_is_the_last(config):
    tabs = [c["props"].get("label") for c in config["components"] if c["type"] == "tabitem"]
    assert tabs[-1] == "Adaptive ranks"
    assert {"Train", "Evaluate & Predict", "Chat", "Export"} <= set(tabs)


@pytest.mark.parametrize("event", ["preview_train", "run_train", "save_args"])
def test_the_hosts_events_are_given_every_option(event, built, engine):
    (given,) = [fn.inputs for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == event]
    options = {engine.manager.get_elem_by_id(f"adaptive.{key}") for key in KEYS}
    assert options <= set(given)


def test_loading_and_resuming_can_set_every_option(built, engine):
    options = {engine.manager.get_elem_by_id(f"adaptive.{key}") for key in KEYS}
    for event in ("load_args", "check_output_dir", "resume", "change_lang"):
        (shown,) = {tuple(fn.outputs) for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == event}
        assert options <= set(shown), event


@pytest.mark.parametrize("lang", ["en", "ru", "zh", "ko", "ja"])
def test_all_texts_follow_the_language(engine, lang):
    shown = {engine.manager.get_id_by_elem(element): update for element, update in engine.change_lang(lang).items()}
    translated = {f"adaptive.{name}": texts for name, texts in labels.locales().items()}
    silent = {f"adaptive.adaptive_{name}" for name in ("view", "status", "picture", "export_status")}
    keys = {f"adaptive.{field.key}" for field in option_fields()}
    ours = {name for name in engine.manager._id_to_elem if name.startswith("adaptive.adaptive_") or name in keys}
    assert ours - silent == set(translated)
    for name, texts in translated.items():
        ((what, text),) = texts[lang].items()
        assert getattr(shown[name], what) == text, name
        assert lang == "en" or text != texts["en"][what], name


@pytest.mark.parametrize(("run", "out", "said"), [(None, "new", "Choose a finished run."),
                                                   ("  ", "new", "Choose a finished run."),
                                                   ("saves/one", " ", "Name a new folder.")])  # fmt: skip
def test_an_export_without_a_run_or_a_folder_says_which_is_missing(built, run, out, said):
    (start,) = [fn.fn for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == "start"]
    (shown,) = start("en", run, "vllm", out, "")
    assert list(shown.values()) == [said]


def test_the_demo_board_neither_plans_nor_exports(folder):
    demo = interface.create_ui(demo_mode=True)
    assert not components(demo.get_config_file(), elem_id="adaptive_export_box")
    engine = _engine(demo)
    data = {element: getattr(element, "value", None) for element in engine.manager.get_elem_list()}
    named = {"top.lang": "en", "top.model_name": "Custom", "top.model_path": "tiny", "train.dataset": ["tiny_sft"],
             "train.output_dir": "mine", "top.finetuning_type": "adaptive"}  # fmt: skip
    data |= {engine.manager.get_elem_by_id(name): value for name, value in named.items()}
    (shown,) = engine.runner.preview_plan(data)
    assert "demo" in shown["status"].lower()


# -- arguments --------------------------------------------------------------------------------------------------------


def test_defaults_are_loras_arguments_of_another_kind(engine, held):
    lora = engine.runner._parse_train_args(held | {engine.manager.get_elem_by_id("top.finetuning_type"): "lora"})
    made = engine.runner._parse_train_args(held)
    assert {key for key in made if made[key] != lora.get(key)} == {"finetuning_type", "output_dir"}
    assert made["finetuning_type"] == "adaptive"
    assert made["output_dir"] == "saves/Custom/adaptive/mine"
    assert set(lora) == set(made)


def test_changed_options_reach_the_yaml_of_a_run(engine, held, tmp_path):
    data = change(engine, held, adaptive_method="igu", igu_descale="false", adaptive_min_rank=0)
    args = engine.runner._parse_train_args(data)
    written = yaml.safe_load(open(runner.save_cmd({**args, "output_dir": str(tmp_path)})))  # noqa: SIM115
    assert written["adaptive_method"] == "igu"
    assert written["igu_descale"] == "false"
    assert written["adaptive_min_rank"] == 0


def test_an_adapter_to_go_on_with_is_that_of_an_adaptive_run(engine, held):
    data = held | {engine.manager.get_elem_by_id("top.checkpoint_path"): ["first"]}
    assert engine.runner._parse_train_args(data)["adapter_name_or_path"] == "saves/Custom/adaptive/first"


def test_settings_of_other_kinds_are_the_hosts(engine, held):
    for kind in ("lora", "full", "freeze", "oft"):
        data = held | {engine.manager.get_elem_by_id("top.finetuning_type"): kind}
        data = change(engine, data, adaptive_method="igu")
        assert not KEYS & set(engine.runner._parse_train_args(data)), kind


def test_a_wrong_value_is_told_before_anything_starts(engine, held):
    (shown,) = engine.runner.preview_train(change(engine, held, adaptive_min_rank=-1))
    (text,) = shown.values()
    assert "adaptive_min_rank" in text
    assert "at least 0" in text.replace("&#32;", " ")


def test_saved_arguments_have_only_ids_of_a_board_without_the_plugin(engine, held, folder):
    data = change(engine, held, adaptive_method="igu", igu_beta2=0.9)
    engine.runner.save_args(data)
    saved = yaml.safe_load((folder / "llamaboard_config" / "mine.yaml").read_text())
    plain = {name for name in engine.manager._id_to_elem if not name.startswith("adaptive.")}
    assert set(saved) <= plain
    assert json.loads((folder / "llamaboard_config" / "mine.yaml.adaptive.json").read_text()) == {
        "adaptive_method": "igu", "igu_beta2": 0.9,
    }  # fmt: skip
    loaded = {
        engine.manager.get_id_by_elem(element): value
        for element, value in engine.runner.load_args("en", "mine.yaml").items()
    }
    assert loaded["adaptive.igu_beta2"] == 0.9
    assert loaded["adaptive.adaptive_method"] == "igu"
    assert loaded["top.finetuning_type"] == "adaptive"


def test_a_reloaded_page_gets_the_options_of_the_run_that_trains(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "running", True)
    options = {engine.manager.get_elem_by_id(f"adaptive.{key}"): BLANK[key] for key in KEYS}
    monkeypatch.setattr(engine.runner, "running_data", change(engine, options, igu_beta2=0.7))
    _, restored, _ = engine.resume()
    assert restored[engine.manager.get_elem_by_id("adaptive.igu_beta2")].value == 0.7


def test_one_preview_at_a_time_and_no_start_beside_it(engine, held, folder):
    running = folder / "llamaboard_cache" / "adaptive_preview" / "running"
    running.mkdir(parents=True)
    with engine.runner.command._alone():
        (shown,) = engine.runner.preview_plan(held)
        (refused,) = engine.runner.run_train(held)
    assert shown["status"] == next(iter(refused.values()))
    assert shown["status"].startswith("A preview or an export is running")
    assert running.exists()


@pytest.fixture
def asked(engine, monkeypatch):
    """Settings of the plans that were asked for; each is made at once."""
    settings = []

    def plan(words):
        settings.append(yaml.safe_load(Path(words[-1]).read_text()))
        make_plan().save(Path(words[-1]).parent / PLAN_FILE)
        yield Progress(3, "", "scoring")
        yield Progress(9, "the table", "", 0)

    monkeypatch.setattr(engine.runner.command, "run", plan)
    return settings


def test_a_new_preview_removes_the_earlier_ones_of_its_board_alone(engine, held, folder, asked):
    others = folder / "llamaboard_cache" / "adaptive_preview" / "another_board" / "preview"
    others.mkdir(parents=True)
    for _ in range(2):
        *_, done = engine.runner.preview_plan(held)
    first, second = (Path(settings["output_dir"]) for settings in asked)
    assert not first.exists()
    assert Path(done["plan_path"]) == second / PLAN_FILE
    assert Path(done["plan_path"]).is_file()
    assert others.exists()


def test_a_preview_that_another_forestalls_leaves_no_abort_and_removes_nothing(engine, held, asked, monkeypatch):
    *_, done = engine.runner.preview_plan(held)

    def refuse(words):
        raise BusyError
        yield

    monkeypatch.setattr(engine.runner.command, "run", refuse)
    begun, refused = engine.runner.preview_plan(held)
    assert "stop_btn" not in {**begun, **refused}
    assert [path.name for path in Path(done["plan_path"]).parents[1].iterdir()] == [
        Path(done["plan_path"]).parent.name
    ]


def test_a_preview_leaves_the_folder_of_the_run_alone_and_shows_what_the_command_says(engine, held, asked):
    begun, waiting, done = engine.runner.preview_plan(held)
    assert asked[0]["output_dir"].startswith("llamaboard_cache/adaptive_preview/")
    assert waiting["status"] == "Planning ranks: 3 s"
    assert done["status"] == "Planned in 9 s: 240 of 240 parameters; nothing was trained."
    assert [row[:2] for row in done["rank_table"]] == [[module.name, module.rank] for module in make_plan().modules]
    assert 'class="heat' in done["picture"]
    assert "stop_btn" not in begun, "there is nothing to abort yet"
    assert waiting["stop_btn"].visible
    assert not done["stop_btn"].visible


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (Progress(9, "", "error: no such model", 2), "It failed (exit code 2); the reason stands below."),
        (Progress(9, "", "", -15, "aborted"), "Aborted."),
        (Progress(9, "", "", -15, "too_long"), "Ended after 2 hours; run it in a terminal instead."),
        (
            Progress(9, "a schedule", "", 0),
            "This method finds its ranks during training; its schedule is shown below.",
        ),
    ],
)
def test_a_preview_without_a_plan_says_why(engine, held, monkeypatch, end, status):
    monkeypatch.setattr(engine.runner.command, "run", lambda words: iter([end]))
    *_, done = engine.runner.preview_plan(held)
    assert done["status"] == status
    assert done["plan_path"] == ""
    assert done["plan_text"].value == (end.complained or end.said)
