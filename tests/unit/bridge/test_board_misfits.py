"""Boards of hosts whose tabs are other than expected: nothing of ours is left half built, and the board starts."""

import pytest


pytest.importorskip("gradio")
import gradio as gr
from llamafactory.webui import interface, runner

from llamafactory_adaptive.bridge.board import interface as ours
from llamafactory_adaptive.bridge.board import training_figure


TRAIN_TAB, FOOTER = interface.create_train_tab.__wrapped__, interface.create_footer.__wrapped__


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    """What is logged as lost, and why."""
    lost = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "load_args", runner.load_args)  # taken back by a board without a panel
    for module in (ours, training_figure):
        monkeypatch.setattr(module, "log_loss", lambda *words: lost.append(words))
    return lost


@pytest.fixture
def hosts_own(log, monkeypatch):
    """The page of a board without the plugin's tabs."""
    with monkeypatch.context() as patch:
        patch.setattr(interface, "create_train_tab", TRAIN_TAB)
        patch.setattr(interface, "create_footer", FOOTER)
        return interface.create_ui().get_config_file()


def page(monkeypatch, train_tab=TRAIN_TAB):
    monkeypatch.setattr(interface, "create_train_tab", ours.with_panel(train_tab))
    return interface.create_ui().get_config_file()


def types(config):
    return [component["type"] for component in config["components"]]


def events_are_of_components_that_there_are(config):
    known = {component["id"] for component in config["components"]}
    used = {name for event in config["dependencies"] for name in [*event["inputs"], *event["outputs"]]}
    return used <= known


def without_rank(engine):
    elements = TRAIN_TAB(engine)
    del elements["lora_rank"]
    return elements


def test_a_train_tab_without_the_rank_is_left_as_it_is(monkeypatch, hosts_own, log):
    config = page(monkeypatch, without_rank)
    assert types(config) == types(hosts_own)
    assert len(config["dependencies"]) == len(hosts_own["dependencies"])
    assert events_are_of_components_that_there_are(config)
    chosen_from = [component["props"].get("choices") or [] for component in config["components"]]
    assert [[kind for kind, _ in choices] for choices in chosen_from if ("lora", "lora") in choices] == [
        ["full", "freeze", "lora", "oft"]
    ]
    assert log == [("LLaMA Board does not offer adaptive ranks", "its Train tab: KeyError: 'lora_rank'")]


def test_saved_adaptive_settings_are_the_hosts_business_on_a_board_without_the_panel(monkeypatch, tmp_path):
    page(monkeypatch, without_rank)
    (tmp_path / "mine.yaml").write_text("top.finetuning_type: adaptive\n")
    assert runner.load_args(str(tmp_path / "mine.yaml")) == {"top.finetuning_type": "adaptive"}


def test_a_tab_that_the_host_itself_cannot_build_is_its_own_error(monkeypatch):
    def broken(engine):
        raise LookupError("the host's own")

    with pytest.raises(LookupError, match="the host's own"):
        page(monkeypatch, broken)


def test_a_tab_of_ranks_that_fails_leaves_the_panel(monkeypatch, log):
    def half_built(engine):
        with gr.Tab("half built"):
            gr.Button("half built").click(print)
            raise AttributeError("no such thing")

    monkeypatch.setattr(ours, "build_ranks_tab", half_built)
    config = page(monkeypatch)
    names = [
        component["props"].get(what) for component in config["components"] for what in ("label", "value", "elem_id")
    ]
    assert "half built" not in names
    assert "adaptive_panel" in names
    assert events_are_of_components_that_there_are(config)
    assert log == [("LLaMA Board shows no finished runs", "its footer: AttributeError: no such thing")]


def test_a_figure_that_cannot_be_drawn_is_the_hosts_and_told_once(monkeypatch, tmp_path, log):
    def misfit(*_):
        raise AttributeError("no such axis")

    monkeypatch.setattr(training_figure, "_figure", misfit)
    monkeypatch.setattr(training_figure, "ranks_so_far", lambda folder: "ranks")
    training_figure._log_once.cache_clear()
    with_ranks = training_figure.with_ranks(lambda *_: ("", "", {"loss_viewer": "the host's"}))
    for _ in range(2):
        assert with_ranks("en", str(tmp_path), True)[2] == {"loss_viewer": "the host's"}
    assert len(log) == 1
