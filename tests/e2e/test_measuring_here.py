"""A base that is measured where it trains is loaded once, and the run is bit for bit that of a measured copy."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import LlamaForCausalLM, TrainerCallback

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.random_state import RandomState
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.planning.cache import CACHE_ENV
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.tiny import settings
from tests.helpers.training import adapters_equal


pytestmark = pytest.mark.slow


class Look(TrainerCallback):
    """Notes all that a run starts with."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # As bytes: 4-bit weights that are stored as bf16 hold what reads as NaN there.
        self.tensors = {
            name: tensor.detach().clone().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()
        }
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks)
                      for name, module in model.named_modules()}  # fmt: skip
        self.flags = {name: {key: value for key, value in vars(module).items()
                             if isinstance(value, (bool, int, float, str, torch.dtype))}
                      for name, module in model.named_modules()}  # fmt: skip
        self.config = model.config.to_dict()
        self.random = RandomState.current()


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_llama, data_dir):
    """Train with a cache of its own; a process of its own is this one, which has imported everything."""

    def run_job(job, devices):
        measure_process.run_measurement_job(ScoringJob.from_json(json.loads(json.dumps(job.to_json()))))
        PartialState._reset_state()

    monkeypatch.setattr(measure_process, "run_job", run_job)
    loads, original = [], LlamaForCausalLM.from_pretrained.__func__
    counted = classmethod(lambda cls, *args, **more: loads.append(1) or original(cls, *args, **more))
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", counted)
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    def train(process, **more):
        monkeypatch.setenv(CACHE_ENV, str(tmp_path / f"cache_{process}"))
        loads.clear()
        look, out = Look(), tmp_path / process
        run_exp(settings(tiny_llama, data_dir, out, adaptive_calibration_process=process, **more), [look])
        plan = load_plan(out / "adaptive_rank_plan.json")
        return SimpleNamespace(look=look, out=out, plan=plan, loads=len(loads))

    return train


CASES = {
    "dropout": {"lora_dropout": 0.1},
    "4bit": {"quantization_bit": 4, "bf16": True},
    "start": {"sensitivity_weighting": "gradient", "adaptive_init": "eva", "adaptive_calibration_batch_size": 8},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_wherever_its_base_is_measured(case, run):
    own, here = (run(process, **CASES[case]) for process in ("own", "auto"))
    assert (here.loads, own.loads) == (1, 3 if case == "start" else 2)
    assert here.plan.digest() == own.plan.digest()
    assert [module.score for module in here.plan.modules] == [module.score for module in own.plan.modules]
    a, b = here.look, own.look
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert (a.trainable, a.training, a.hooks, a.flags, a.config) == (
        b.trainable, b.training, b.hooks, b.flags, b.config
    )  # fmt: skip
    assert torch.equal(a.random.cpu, b.random.cpu)
    assert a.random.python == b.random.python
    assert a.random.numpy[1].tolist() == b.random.numpy[1].tolist()
    assert adapters_equal(here.out, own.out)
