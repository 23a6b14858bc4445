"""Files of settings that the board saves and loads."""

from pathlib import Path

import pytest
import yaml


pytest.importorskip("gradio")
from llamafactory_adaptive.bridge.board import labels
from llamafactory_adaptive.bridge.board.option_fields import option_fields
from llamafactory_adaptive.bridge.board.saved_settings import elem_id, file_beside, loading, saving


BLANK = {field.key: field.blank for field in option_fields()}


def _save(path, settings):
    Path(path).write_text(yaml.safe_dump(settings))


def _load(path):
    return yaml.safe_load(Path(path).read_text())


def test_the_hosts_file_has_no_id_of_the_plugin_and_loading_gives_every_field_back(tmp_path):
    path = str(tmp_path / "mine.yaml")
    held = {elem_id(key): value for key, value in BLANK.items()}
    held |= {elem_id("adaptive_method"): "igu", elem_id("igu_descale"): "false"}
    host = {"top.finetuning_type": "adaptive", "train.lora_rank": 4}
    saving(_save)(path, {**host, **held})
    assert _load(path) == host
    assert loading(_load)(path) == {**host, **held}


def test_names_with_dots_have_files_of_their_own(tmp_path):
    for name, method in (("my.v1", "igu"), ("my.v2", "adalora"), ("my.v1.yaml", "svd")):
        saving(_save)(str(tmp_path / name), {"top.finetuning_type": "adaptive", elem_id("adaptive_method"): method})
    held = {name: loading(_load)(str(tmp_path / name))[elem_id("adaptive_method")] for name in ("my.v1", "my.v2")}
    assert held == {"my.v1": "igu", "my.v2": "adalora"}
    assert file_beside("my.v1.yaml") == Path("my.v1.yaml.adaptive.json")


def test_settings_of_another_method_leave_nothing_beside_them(tmp_path):
    path = str(tmp_path / "mine.yaml")
    saving(_save)(path, {"top.finetuning_type": "adaptive", elem_id("adaptive_method"): "igu"})
    saving(_save)(path, {"top.finetuning_type": "lora", elem_id("adaptive_method"): "igu"})
    assert not file_beside(path).exists()
    assert loading(_load)(path) == {"top.finetuning_type": "lora"}


@pytest.fixture
def warnings(monkeypatch, tmp_path):
    """What the board warns of, in Chinese, which was chosen last."""
    told = []
    monkeypatch.setattr("llamafactory_adaptive.bridge.board.saved_settings.gr.Warning", told.append)
    monkeypatch.chdir(tmp_path)
    Path("llamaboard_cache").mkdir()
    Path("llamaboard_cache/user_config.yaml").write_text("lang: zh\n")
    return told


@pytest.mark.parametrize("text", [None, "{", "[]", '{"unknown": 3}', '{"adaptive_method": "<script>"}',
                                  '{"adaptive_min_rank": "many"}'])  # fmt: skip
def test_a_file_without_one_beside_it_or_with_a_damaged_one_gives_defaults_and_says_so(text, warnings):
    _save("mine.yaml", {"top.finetuning_type": "adaptive"})
    if text is not None:
        file_beside("mine.yaml").write_text(text)
    loaded = loading(_load)("mine.yaml")
    assert {key: loaded[elem_id(key)] for key in BLANK} == BLANK
    assert len(loaded) == len(BLANK) + 1
    assert warnings == [labels.message("settings_lost", "zh", file="mine&#46;yaml&#46;adaptive&#46;json")]


def test_of_a_file_that_is_partly_damaged_the_rest_is_read(warnings):
    _save("mine.yaml", {"top.finetuning_type": "adaptive"})
    file_beside("mine.yaml").write_text('{"adaptive_method": "igu", "igu_beta2": "high"}')
    loaded = loading(_load)("mine.yaml")
    assert loaded[elem_id("adaptive_method")] == "igu"
    assert len(warnings) == 1


def test_nothing_is_said_of_whole_settings_and_of_other_methods(warnings):
    saving(_save)("mine.yaml", {"top.finetuning_type": "adaptive", elem_id("adaptive_method"): "igu"})
    _save("other.yaml", {"top.finetuning_type": "lora"})
    loading(_load)("mine.yaml")
    loading(_load)("other.yaml")
    assert not warnings
