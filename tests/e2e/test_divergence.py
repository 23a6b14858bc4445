"""Runs that go wrong: they end early, say since when and why, and leave nothing that looks finished."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import GuardError
from tests.helpers.tiny import pruning_settings, save_tiny, settings, tsq_settings
from tests.helpers.training import train
from tests.helpers.workers import train_on_two


pytestmark = pytest.mark.slow
MAKERS = {"uniform": settings, "igu": pruning_settings, "tsq": tsq_settings}


def arguments(method, base, data, out, **more):
    kept = MAKERS[method](base, data, out, max_steps=12, save_strategy="steps", save_steps=1, **more)
    if method == "uniform":
        kept = {key: value for key, value in kept.items() if "calibration" not in key}
    return {**kept, "adaptive_method": method}


class Spoil(TrainerCallback):
    """Put NaN into what every forward pass returns for some steps, or into the weights for good."""

    def __init__(self, first, steps=None):
        self.first, self.steps = first, steps

    def on_step_begin(self, args, state, control, model, **kwargs):
        step = state.global_step + 1
        if self.steps is None and step == self.first:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        if self.steps is not None:
            bad = self.first <= step < self.first + self.steps
            self.handle = getattr(self, "handle", None) or model.register_forward_hook(self._spoil)
            self.bad = bad

    def _spoil(self, model, inputs, output):
        if self.bad:
            output["loss"] = output["loss"] * 0.0 + torch.full_like(output["loss"], float("inf")).detach()


@pytest.mark.parametrize("method", ["uniform", "igu", "tsq"])
def test_it_ends_after_three_steps_with_step_and_checkpoint(method, tiny_llama, data_dir, tmp_path):
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    out = tmp_path / "out"
    more = {"adaptive_interval": 4} if method == "igu" else {}
    with pytest.raises(GuardError, match=r"since step 3 \(\d steps\): training diverged") as caught:
        run_exp(arguments(method, tiny_llama, data_dir, out, **more), [Spoil(3)])
    assert f"resume from {out / 'checkpoint-2'}" in str(caught.value)
    assert "adaptive_max_nonfinite_steps: 3" in str(caught.value)
    assert not (out / "adapter_model.safetensors").exists()


def test_the_same_command_goes_on_from_before_the_divergence(tiny_llama, data_dir, tmp_path, caplog):
    """The checkpoints that were saved meanwhile are whole, but nobody can go on from them."""
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    args = arguments("uniform", tiny_llama, data_dir, tmp_path / "out") | {"overwrite_output_dir": False}
    with pytest.raises(GuardError, match="training diverged"):
        run_exp(args, [Spoil(3)])
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    run_exp(args)
    assert "checkpoint-3 is damaged or was not written to its end (adapter_model.safetensors holds NaN" in caplog.text
    assert "resuming from checkpoint-2" in caplog.text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_few_bad_losses_are_borne(tiny_llama, data_dir, tmp_path):
    """The loss is infinite and its gradient zero for two steps: nothing was lost, the run goes on."""
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    run_exp(arguments("uniform", tiny_llama, data_dir, tmp_path / "two"), [Spoil(3, steps=2)])
    assert (tmp_path / "two" / "adapter_model.safetensors").is_file()
    with pytest.raises(GuardError, match=r"since step 3 \(3 steps\)"):
        run_exp(arguments("uniform", tiny_llama, data_dir, tmp_path / "three"), [Spoil(3, steps=3)])
    more = {"adaptive_max_nonfinite_steps": 5}
    run_exp(arguments("uniform", tiny_llama, data_dir, tmp_path / "borne", **more), [Spoil(3, steps=3)])
    assert (tmp_path / "borne" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["uniform", "igu"])
def test_a_base_that_is_no_number_is_named_at_the_first_step(method, data_dir, tmp_path):
    base = save_tiny(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GuardError, match=r"step 1 is NaN or infinite because the base model itself is: .*up_proj"):
        train(arguments(method, base, data_dir, tmp_path / "out"))


def test_an_adapter_that_breaks_in_the_last_step_is_not_saved(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    args = arguments("uniform", tiny_llama, data_dir, out) | {"max_steps": 3, "save_strategy": "no"}
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    with pytest.raises(GuardError, match="the trained adapter holds NaN or infinity"):
        run_exp(args, [Spoil(3)])
    assert not (out / "adapter_model.safetensors").exists()


def test_two_processes_end_together(tiny_llama, data_dir, tmp_path):
    args = arguments("uniform", tiny_llama, data_dir, tmp_path / "out") | {"learning_rate": 1.0e30}
    with pytest.raises(AssertionError) as caught:
        train_on_two(json.loads(json.dumps(yaml.safe_load(yaml.safe_dump(args)))), tmp_path / "logs")
    assert "exit codes [1, 1]" in str(caught.value)
    for log in (tmp_path / "logs").glob("*.log"):
        assert "training diverged" in log.read_text()
