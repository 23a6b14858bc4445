"""The hosts: what is said to be tested, every name that is imported from one, and the plan as a plugin of its v1."""

import ast
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.bridge.upstream_names import UPSTREAM_NAMES, name_states
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.versions import host_version, verified_hosts
from tests.helpers.second_stage import given_plan
from tests.helpers.tiny import tiny_model


_bootstrap.install()
ROOT = Path(__file__).resolve().parents[2]
HAS_V1 = pytest.mark.skipif(find_spec("llamafactory.v1") is None, reason="this LLaMA-Factory has no v1")


def imports_from_the_host(path):
    """Pairs of module and name of every ``from llamafactory... import ...`` in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llamafactory":
            for name in node.names:
                yield node.module, name.name


def test_every_name_that_is_imported_from_the_host_is_in_the_table_and_there():
    optional = {"v1.py"}  # which runs go on without
    board = ROOT / "llamafactory_adaptive" / "bridge" / "board"  # imported as its seams are applied, which tells
    every = (ROOT / "llamafactory_adaptive").rglob("*.py")
    files = [path for path in every if path.name not in optional and path.parent != board]
    found = {pair for path in files for pair in imports_from_the_host(path)}
    assert found == {(module, name) for module, names in UPSTREAM_NAMES.items() for name in names}
    assert set(name_states().values()) == {"fits"}


def test_a_name_that_is_gone_is_told(monkeypatch):
    monkeypatch.setitem(UPSTREAM_NAMES, "llamafactory.extras.misc", ("is_env_enabled", "gone"))
    monkeypatch.setitem(UPSTREAM_NAMES, "llamafactory.gone", ("anything",))
    states = name_states()
    assert states["llamafactory.extras.misc.is_env_enabled"] == "fits"
    assert states["llamafactory.extras.misc.gone"] == "does not exist"
    assert states["llamafactory.gone.anything"].startswith("cannot be imported (ModuleNotFoundError")


def test_what_is_said_to_be_tested_is_what_can_be_installed_and_what_readme_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked, *_) = project["optional-dependencies"]["llamafactory"]
    assert asked == "llamafactory>=0.9.5,<0.10"
    readme = (ROOT / "README.md").read_text()
    for host in verified_hosts():
        assert host["version"].startswith("0.9.")
        pinned = (ROOT / "constraints" / host["constraints"]).read_text().splitlines()
        if host["source"] == "PyPI":
            assert f"llamafactory=={host['version']}" in pinned
        assert f"{host['version']} ({host['source']})" in readme
    assert host_version() in {host["version"] for host in verified_hosts()}


@HAS_V1
def test_a_plan_is_a_plugin_of_v1_and_gives_every_module_its_rank(tmp_path):
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    plan = given_plan()
    plan.save(tmp_path / "plan.json")
    settings = {"name": "adaptive", "plan": str(tmp_path / "plan.json"), "lora_dropout": 0.0}
    model = PeftPlugin("adaptive")(tiny_model(), settings, True)
    ranks = {name.partition(".lora_A.")[0].removeprefix("base_model.model."): weight.shape[0]
             for name, weight in model.named_parameters() if ".lora_A." in name}  # fmt: skip
    assert ranks == {module.name: module.rank for module in load_plan(tmp_path / "plan.json").active}
    model.save_pretrained(tmp_path / "adapter")
    again = PeftPlugin("adaptive")(
        tiny_model(), {"name": "adaptive", "adapter_name_or_path": str(tmp_path / "adapter")}, True
    )
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


@HAS_V1
def test_v1_is_told_what_is_wrong_with_its_settings():
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    with pytest.raises(AdaptiveConfigError) as caught:
        PeftPlugin("adaptive")(tiny_model(), {"name": "adaptive", "r": 8, "plan": "no/such.json"}, True)
    assert [problem.key for problem in caught.value.problems] == ["r", "plan"]


@HAS_V1
@pytest.mark.parametrize("words", [["x.yaml"], ["y.yaml", "finetuning_type=adaptive"]])
def test_v1_refuses_other_settings_in_one_message(words, tmp_path, monkeypatch, capsys):
    from llamafactory.v1 import launcher

    (tmp_path / "x.yaml").write_text("finetuning_type: adaptive\n")
    (tmp_path / "y.yaml").write_text("model: m\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", *words])
    with pytest.raises(SystemExit) as ended:
        launcher.launch()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "USE_V1: '1' is invalid" in error
    assert "peft_config: {name: adaptive, plan: FILE}" in error
