"""The command from end to end: cut, checked, exported, reported, planned on; and the curve with held-out losses."""

import json
import shlex

import pytest
import yaml

from llamafactory_adaptive import check_adapter, cli
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.lora import edit_config, save_adapter
from tests.helpers.tiny import settings


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return save_adapter(tiny_llama, tmp_path / "adapter", r=8, lora_alpha=128, target_modules=targets)


def test_a_cut_adapter_is_checked_exported_reported_and_trained_afresh(
    adapter, tiny_llama, data_dir, tmp_path, capsys
):
    out = tmp_path / "cut"
    assert cli.main(["shrink", str(adapter), "--rank", "3", "--out", str(out)]) == 0
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert check_adapter(out, plan) == 0
    assert (plan.lora_rank, plan.lora_alpha) == (3, 48)
    said = capsys.readouterr().out
    assert "next:" in said
    [afresh] = [line for line in said.splitlines() if "llamafactory-cli train" in line]
    assert cli.main(["export", str(out), "--for", "vllm-legacy", "--out", str(tmp_path / "served")]) == 0
    assert "modules   passed" in capsys.readouterr().out
    assert cli.main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out} (cut by shrink)")
    assert "cut after training    from 8,192 parameters; " in said
    # The YAML of the LoRA run: its own finetuning_type, and an alpha that over another rank were another strength.
    path = tmp_path / "run.yaml"
    trained = settings(tiny_llama, data_dir, tmp_path / "run", finetuning_type="lora", lora_rank=8, lora_alpha=128)
    path.write_text(yaml.safe_dump({key: value for key, value in trained.items() if not key.startswith("adaptive_")}))
    words = shlex.split(afresh, comments=True)
    assert words[:3] == ["llamafactory-cli", "train", "my.yaml"]
    assert f"output_dir={out}-afresh" in words, "the YAML's own holds the run that was cut"
    assert cli.main(["plan", str(path), *words[3:], "--out", str(tmp_path / "plan")]) == 0
    planned = load_plan(tmp_path / "plan" / "adaptive_rank_plan.json")
    assert planned.ranks() == plan.ranks()
    assert planned.scale == plan.scale == 128 / 8


def test_a_curve_needs_no_host_and_writes_no_adapter(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llamafactory_adaptive.cli.shrink.require_enabled", lambda: pytest.fail("the host was asked"))
    assert cli.main(["shrink", str(adapter), "--curve", "--out", str(tmp_path / "curve")]) == 0
    said = capsys.readouterr().out
    names = {path.name for path in (tmp_path / "curve").iterdir()}
    assert names == {"rank_curve.txt", "rank_curve.json", "rank_curve.png"}
    assert (tmp_path / "curve" / "rank_curve.txt").read_text() in said
    assert "energy is not loss" in said


def test_an_adapter_that_cannot_be_smaller_has_no_curve(tiny_llama, tmp_path, capsys):
    smallest = save_adapter(tiny_llama, tmp_path / "one", r=1, lora_alpha=2, target_modules=["q_proj"])
    assert cli.main(["shrink", str(smallest), "--curve", "--out", str(tmp_path / "out")]) == 2
    assert "the adapter's 128 parameters are the fewest that it allows; try --min-rank 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_curve_with_data_takes_losses_in_the_other_process_and_names_the_smallest_within(
    adapter, tiny_llama, data_dir, tmp_path, capsys, monkeypatch
):
    from llamafactory_adaptive import _bootstrap

    _bootstrap.install()
    from llamafactory_adaptive.bridge import measure_process
    from llamafactory_adaptive.bridge.held_out import HeldOutJob, run_held_out_job

    sent = []

    def run_here(command, environment, log, job):
        sent.append(json.loads(job)["settings"])
        run_held_out_job(HeldOutJob.from_json(json.loads(job)))
        return 0, ""

    monkeypatch.setattr(measure_process, "run_child", run_here)
    edit_config(adapter, base_model_name_or_path="hub/another")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_llama, data_dir, tmp_path / "run", per_device_eval_batch_size=2)))
    words = ["--data", "tiny_eval", "--config", str(path), "cutoff_len=40", "--samples", "5", "--within", "1000%"]
    assert cli.main(["shrink", str(adapter), "--curve", *words, "--out", str(tmp_path / "curve")]) == 0
    assert [settings["cutoff_len"] for settings in sent] == [40]
    said = capsys.readouterr()
    assert "the adapter names hub/another as its base model" in said.err
    assert "5 rows of tiny_eval" in said.out
    document = json.loads((tmp_path / "curve" / "rank_curve.json").read_text())
    assert (document["rows"], document["named_by"], document["within"]) == (5, "loss", 10.0)
    assert document["named"]["parameters"] == document["points"][-1]["parameters"] == 1024
    assert len({point["loss"] for point in document["points"]}) == 5
    assert document["points"][0]["rise"] == 0
    assert sorted(path.name for path in (tmp_path / "curve").iterdir()) == [
        "rank_curve.json", "rank_curve.png", "rank_curve.txt",
    ]  # fmt: skip
