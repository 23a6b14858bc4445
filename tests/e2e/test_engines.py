"""One global batch on every engine: one process, DDP, ZeRO-1, 2 and 3 on two processes find the same ranks."""

import itertools
import json
import operator
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.data_report import SAMPLES_FILE
from tests.helpers.commands import BIN, EXAMPLES, run
from tests.helpers.engines import HARD, check_same, check_same_end, deepspeed_config, engine_of
from tests.helpers.second_stage import given_plan
from tests.helpers.tiny import pruning_settings, tsq_settings
from tests.helpers.training import train
from tests.helpers.workers import train_on_two


pytestmark = pytest.mark.slow
REPEATS = pytest.mark.repeats
# DeepSpeed builds its CPU optimizer when it is first asked for.
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
# Whatever of IGU-LoRA an engine could do in another way: typical importances and norms of gradients are summed over
# processes, lambda and the optimizer's states are reset and scaled.
IGU = {**HARD, "igu_importance": "shrink", "igu_mend_strength": True, "igu_init": "gaussian",
       "igu_uncertainty": "snr", "igu_epsilon": 1e-6, "igu_orthogonality_weight": 0.1,
       "igu_returns": "zero"}  # fmt: skip
PROBING = {"igu_importance": "integrated", "igu_mend_strength": None, "igu_probe_interval": 2}
# Where B starts at zero some gradients are near zero, and Adam makes their rounding visible: a larger epsilon helps.
TSQ = {**HARD, "adam_epsilon": 1e-4}
SAMPLES = {"tsq_alignment_weight": 0.5, "tsq_projection": 0}


@pytest.fixture(scope="module")
def alone(tiny_llama, data_dir, tmp_path_factory):
    """The reference: one process sees the whole batch. Two micro-batches a step, and clipping at every step."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(pruning_settings(tiny_llama, data_dir, out, per_device_train_batch_size=4, **IGU))
    lines = [line for line in map(json.loads, (out / "adaptive_log.jsonl").read_text().splitlines())
             if line["event"] == "allocation"]  # fmt: skip
    totals = [sum(line["ranks"]) for line in lines]
    changes = [line["components_changed"] for line in lines[1:]]
    removed = [before - after for before, after in itertools.pairwise(totals)]
    assert any(map(operator.gt, changes, removed)), "components come back, so lambdas and states are reset"
    return out


@pytest.fixture
def make(tiny_llama, data_dir, tmp_path):
    """Settings of one of two processes, half the batch each."""
    return lambda **more: pruning_settings(tiny_llama, data_dir, tmp_path / "out", **{**IGU, **more})


SAVING = {"save_strategy": "steps", "save_steps": 5, "overwrite_output_dir": False}


def checkpoint_of_step_5(out, again):
    shutil.copytree(out / "checkpoint-5", again / "checkpoint-5")
    return {**SAVING, "output_dir": str(again)}


@REPEATS
def test_ddp_started_by_torchrun_finds_the_same_ranks_as_one_process(make, alone, tmp_path):
    import llamafactory.launcher as launcher

    (tmp_path / "two.yaml").write_text(yaml.safe_dump(make()))
    original = Path(launcher.__file__).parent / "launcher.py"
    run(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29541", original, tmp_path / "two.yaml")
    check_same(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        pytest.param(1, {}, id="zero1", marks=REPEATS),
        pytest.param(2, {"offload_optimizer": {"device": "cpu"}}, id="zero2-offload", marks=[REPEATS, NEEDS_COMPILER]),
    ],
)
def test_zero_1_and_2_find_the_same_ranks_as_one_process(stage, zero, make, alone, tmp_path):
    train_on_two(make(deepspeed=str(deepspeed_config(tmp_path, stage, **zero))), tmp_path / "logs")
    check_same(tmp_path / "out", alone)


@pytest.mark.parametrize("engine", [pytest.param(0, marks=REPEATS), pytest.param(2, marks=REPEATS), 3, "fsdp2"])
def test_two_processes_resume_bitwise_and_find_the_same_ranks(engine, make, alone, tmp_path):
    """The whole run first; then again from its checkpoint of step 5, alone in another folder. 0 is DDP."""
    settings_of_engine, environment = engine_of(engine, tmp_path)
    more = {"save_strategy": "steps", "save_steps": 5, "overwrite_output_dir": False, **settings_of_engine}
    train_on_two(make(**more), tmp_path / "logs", **environment)
    out, again = tmp_path / "out", tmp_path / "again"
    check_same(out, alone)
    shutil.copytree(out / "checkpoint-5", again / "checkpoint-5")
    (again / "adaptive_log.jsonl").write_text((out / "adaptive_log.jsonl").read_text().splitlines()[0] + "\n")
    train_on_two(make(**more, output_dir=str(again)), tmp_path / "logs", **environment)
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (again, out))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    lines = [json.loads(line) for line in (again / "adaptive_log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines[1:3]] == [("resumed", 5), ("allocation", 6)]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        pytest.param(0, SAMPLES, id="ddp"),
        pytest.param(1, SAMPLES, id="zero1", marks=REPEATS),
        pytest.param(2, SAMPLES, id="zero2", marks=REPEATS),
        pytest.param(3, {"tsq_sampling": False}, id="zero3-ranks", marks=REPEATS),
    ],
)
def test_two_processes_choose_samples_and_ranks_as_one_does(stage, parts, tiny_llama, data_dir, tmp_path, alone_tsq):
    """The same samples at every step, the same ranks at every refresh; then resumed from step 5, bitwise the same."""
    more = {**TSQ, **parts, **SAVING}
    if stage:
        # Small parameters stay gathered under ZeRO-3; here these are all of them.
        persistent = {"stage3_param_persistence_threshold": 1_000_000} if stage == 3 else {}
        more["deepspeed"] = str(deepspeed_config(tmp_path, stage, **persistent))
    out, again = tmp_path / "out", tmp_path / "again"
    train_on_two(tsq_settings(tiny_llama, data_dir, out, **more), tmp_path / "logs")
    alone = alone_tsq[parts is not SAMPLES]
    check_same(out, alone, tolerance=1e-3)
    if parts is SAMPLES:
        samples, expected = ([json.loads(line) for line in (folder / SAMPLES_FILE).read_text().splitlines()]
                             for folder in (out, alone))  # fmt: skip
        assert [sample["used"] for sample in samples] == [sample["used"] for sample in expected]
        assert [s["quality"] for s in samples] == pytest.approx([s["quality"] for s in expected], abs=1e-4)
    shutil.copytree(out / "checkpoint-5", again / "checkpoint-5")
    train_on_two(tsq_settings(tiny_llama, data_dir, again, **more), tmp_path / "logs")
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (again, out))
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@REPEATS
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_train_given_ranks_as_one_does_and_resume_bitwise(stage, make, tmp_path):
    """P diag(lambda) Q with the authors' regulariser; the second run goes on from the first one's checkpoint."""
    plan, again = tmp_path / "plan.json", tmp_path / "again"
    given_plan().save(plan)
    more = {"adaptive_plan": str(plan), "igu_variant": "published", "max_steps": 6, "save_strategy": "steps",
            "save_steps": 3, "overwrite_output_dir": False}  # fmt: skip
    train(make(**more, output_dir=str(tmp_path / "alone"), per_device_train_batch_size=4))
    if stage:
        more["deepspeed"] = str(deepspeed_config(tmp_path, stage))
    train_on_two(make(**more), tmp_path / "logs")
    shutil.copytree(tmp_path / "out" / "checkpoint-3", again / "checkpoint-3")
    train_on_two(make(**more, output_dir=str(again)), tmp_path / "logs")
    folders = (tmp_path / "out", again, tmp_path / "alone")
    out, resumed, alone = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(out[key], resumed[key]) for key in out)
    assert max(float((out[key] - alone[key]).abs().max()) for key in alone) < 1e-5


@REPEATS
def test_two_processes_score_samples_again_alike_and_resume(tiny_llama, data_dir, tmp_path):
    """Each compares its scores with the other's; resumed from step 5 they are bitwise the same."""
    more = {**TSQ, **SAVING, "tsq_refresh_quality": True, "tsq_min_cluster_share": 0.5, "tsq_draws": "quality"}
    out, again = tmp_path / "out", tmp_path / "again"
    train_on_two(tsq_settings(tiny_llama, data_dir, out, **more), tmp_path / "logs")
    log = [json.loads(line) for line in (out / "adaptive_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["event"] == "scoring"] == [2, 5, 8]
    shutil.copytree(out / "checkpoint-5", again / "checkpoint-5")
    train_on_two(tsq_settings(tiny_llama, data_dir, again, **more), tmp_path / "logs")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (again, out))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (again / SAMPLES_FILE).read_text() == (out / SAMPLES_FILE).read_text()


@pytest.fixture(scope="module")
def alone_tsq(tiny_llama, data_dir, tmp_path_factory):
    """One process, with and without choosing samples."""
    outs = []
    for parts in (SAMPLES, {"tsq_sampling": False}):
        outs.append(tmp_path_factory.mktemp("alone") / "out")
        more = {**TSQ, **parts, "per_device_train_batch_size": 4}
        train(tsq_settings(tiny_llama, data_dir, outs[-1], **more))
    return outs


def test_two_processes_probe_what_one_does_which_can_go_on_from_them(make, tmp_path):
    more = {**PROBING, "gradient_accumulation_steps": 1}
    alone, again, whole_batch = tmp_path / "alone", tmp_path / "again", {"per_device_train_batch_size": 4}
    train(make(**more, **whole_batch, output_dir=str(alone)))
    train_on_two(make(**more, **SAVING), tmp_path / "logs")
    check_same(tmp_path / "out", alone)
    train(make(**more, **whole_batch, **checkpoint_of_step_5(tmp_path / "out", again)))
    check_same_end(again, alone)


@pytest.mark.repeats
def test_4bit_under_zero2_started_by_the_command_line_probes_and_prunes(make, tmp_path):
    config = str(EXAMPLES / "deepspeed" / "ds_z2_config.json")
    args = make(deepspeed=config, bf16=True, quantization_bit=4, **PROBING)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(args))
    run(BIN / "llamafactory-cli", "train", tmp_path / "two.yaml", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    assert plan.budget()["left_parameters"] >= 0
    assert len(set(plan.ranks().values())) > 2


@REPEATS
def test_bf16_under_zero3_prunes_to_the_budget(make, tmp_path):
    config = str(EXAMPLES / "deepspeed" / "ds_z3_config.json")
    train_on_two(make(deepspeed=config, bf16=True), tmp_path / "logs")
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    assert plan.budget()["left_parameters"] >= 0
    assert len(set(plan.ranks().values())) > 2


def test_plan_says_what_a_dynamic_run_will_do_and_writes_nothing(make, tmp_path, capsys, monkeypatch):
    from llamafactory_adaptive.cli import main

    monkeypatch.setattr("sys.argv", ["x"])
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(make()))
    assert main(["plan", str(tmp_path / "two.yaml")]) == 0
    said = capsys.readouterr().out
    assert "Ranks are found during training (igu, 14 modules): all start at up to rank 8" in said
    assert "nothing was written" in said
    assert os.listdir(tmp_path) == ["two.yaml"]
