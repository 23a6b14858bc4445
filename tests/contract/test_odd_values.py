"""Settings of the wrong kind: no text where one is read, keys that are no text, paths that no file can have, files of
settings that are none. One message each, before anything is loaded."""

import json

import pytest
import yaml

from llamafactory_adaptive import _bootstrap, cli
from llamafactory_adaptive.errors import AdaptiveConfigError, Problem
from tests.helpers.tiny import settings


_bootstrap.install()
from llamafactory_adaptive.bridge.arguments import command_line_settings, our_keys, to_mapping  # noqa: E402
from llamafactory_adaptive.bridge.launch import _mentions_adaptive  # noqa: E402
from llamafactory_adaptive.bridge.resuming import checkpoint_to_resume  # noqa: E402
from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402


ODD = (5, 2.5, True, ["a", 3], {"a": 1})
TEXTS = {  # and what else the host takes
    "model_name_or_path": (),
    "output_dir": (),
    "template": (),
    "tokenized_path": (),
    "adapter_name_or_path": (),
    "adaptive_plan": (),
    "dataset_dir": (dict,),
    "deepspeed": (dict,),
    "resume_from_checkpoint": (bool,),
    "dataset": (),
    "lora_target": (),
    "additional_target": (),
    "report_to": (),
    "stage": (),
}


@pytest.fixture
def given(tiny_llama, data_dir, tmp_path):
    return lambda **change: to_mapping(settings(tiny_llama, data_dir, tmp_path / "out", **change))


def problems(args):
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(args)
    return caught.value.problems


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("key", TEXTS)
def test_what_is_no_text_is_told_once_under_its_key(key, value, given):
    if isinstance(value, TEXTS[key]):
        pytest.skip("the host takes it")
    reported = problems(given(**{key: value}))
    assert [problem.key for problem in reported] == [key]
    assert reported[0].value == value
    assert reported[0].allowed.startswith("must be ")


@pytest.mark.parametrize("change", [{"lora_target": ["q_proj", "v_proj"]}, {"dataset": ["tiny_sft"]},
                                    {"report_to": ["none"]}, {"run_name": 5}], ids=str)  # fmt: skip
def test_what_the_host_takes_besides_texts_passes(change, given):
    parse_config(given(**change))


IMPOSSIBLE = {
    "x" * 256: "longer than a path can be",
    "y/" * 3000: "longer than a path",
    "a\0b": "has a zero byte in it",
}


@pytest.mark.parametrize(("path", "why"), IMPOSSIBLE.items(), ids=["long name", "long path", "zero byte"])
@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir", "dataset_dir", "adaptive_plan", "deepspeed",
                                 "resume_from_checkpoint", "tokenized_path"])  # fmt: skip
def test_a_path_that_no_file_can_have(key, path, why, given):
    [problem] = problems(given(**{key: "/" + path}))
    assert problem.key == key
    assert why in problem.allowed


def test_a_home_that_nobody_has_is_no_folder(given):
    [problem] = problems(given(model_name_or_path="~no-such-user/model"))
    assert problem.allowed == "there is no such folder"


@pytest.mark.parametrize("key", [1, True, 2.5])
def test_a_key_that_is_no_text(key, given):
    [problem] = problems({**given(), key: 2})
    assert problem.key == str(key)
    assert "neither LLaMA-Factory nor this plugin has such a key" in str(problem)
    assert our_keys({key: 2}) == []


@pytest.mark.parametrize(("text", "said"), [
    ("null", "is no JSON mapping"), ("[]", "is no JSON mapping"), ("[" * 100_000, "levels deep"),
    ('{"tiny_sft": 5}', "is no mapping"), ('{"tiny_sft": ["a"]}', "is no mapping"),
    (json.dumps({"tiny_sft": {"file_name": "x" * 300}}), "does not exist"),
], ids=lambda value: value[:30])  # fmt: skip
def test_a_table_of_datasets_of_another_shape(text, said, given, tmp_path):
    (tmp_path / "dataset_info.json").write_text(text)
    [problem] = problems(given(dataset_dir=str(tmp_path)))
    assert said in problem.allowed


def test_the_word_no_without_quotes(given):
    [problem] = problems(given(save_strategy=False))
    assert str(problem).endswith('try save_strategy: "no"')


def test_an_unknown_reporter_is_told_before_the_model_is_scored(given):
    [problem] = problems(given(report_to="tensorbord"))
    assert "must be one of" in problem.allowed
    assert "tensorboard" in problem.allowed


def test_the_base_model_is_not_written_over(given, tiny_llama):
    [problem] = problems(given(output_dir=f"{tiny_llama}/"))
    assert problem.key == "output_dir"
    assert "it is the base model's folder" in problem.allowed


def test_a_checkpoint_is_asked_for_where_there_is_none(given):
    with pytest.raises(AdaptiveConfigError, match=r"resume_from_checkpoint: True .* there is no checkpoint in"):
        checkpoint_to_resume(given(resume_from_checkpoint=True))


def test_a_value_of_a_megabyte_does_not_fill_the_screen():
    said = str(Problem("dataset", "x" * 2**20, "y" * 2**20, "z"))
    assert said.startswith("dataset: 'xxx")
    assert len(said) < 10_000


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(("name", "said"), [
    ("none.yaml", "there is no such file"), ("folder.yaml", "no such file"), ("a.YAML", "must be a YAML file"),
    ("a.json", "a copy named .yaml"), ("-", "must be a YAML file"),
])  # fmt: skip
def test_what_is_no_file_of_settings_is_told(command, name, said, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    for written in ("a.YAML", "a.json"):
        (tmp_path / written).write_text(json.dumps(given()))
    assert cli.main([command, name]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_settings_in_another_encoding_are_told_and_not_taken_for_a_plain_run(
    encoding, given, tmp_path, monkeypatch
):  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_bytes(yaml.safe_dump(given(run_name="caf\xe9"), allow_unicode=True).encode(encoding))
    assert _mentions_adaptive([str(path)])
    monkeypatch.setattr("sys.argv", ["llamafactory-cli", str(path)])
    with pytest.raises(AdaptiveConfigError, match=r"cannot be read .*codec can't decode"):
        command_line_settings()


def test_a_folder_for_the_plan_that_cannot_be(given, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    idle = {"adaptive_calibration_samples": None, "adaptive_calibration_batch_size": None}
    path.write_text(yaml.safe_dump(given(adaptive_method="uniform", **idle)))
    assert cli.main(["plan", str(path), "--out", str(path)]) == 2
    assert "--out: " in (said := capsys.readouterr().err)
    assert "nothing can be written there" in said


WORDS = ("report", "init", "export --for peft --out o", "export a --for peft --out", "plan a.yaml --out")


@pytest.mark.parametrize("words", WORDS)
def test_a_word_of_the_command_line_that_is_no_path(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words.split(), "x" * 5000])
    assert ended.value.code == 2
    assert "longer than a path can be" in (said := capsys.readouterr().err)
    assert len(said) < 3000
