"""Operations of a step on a device: none mixes devices, none waits, and few are added to plain LoRA's.

Nothing here needs a GPU, and no clock is read.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamafactory_adaptive.accelerator import Stopwatch
from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.calibration import input_moments
from llamafactory_adaptive.calibration.batches import Batch
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments, second_moment_sum
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.methods import Orthogonality
from llamafactory_adaptive.methods.adalora import Adalora, AdaloraOptions
from llamafactory_adaptive.methods.elalora import Elalora, ElaloraOptions
from llamafactory_adaptive.methods.igu import Igu, IguOptions
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.sampling.sample_gradients import SampleGradientRecorder, Tap, TermSpec
from llamafactory_adaptive.sampling.sample_moments import SampleMoments
from llamafactory_adaptive.training.component_resets import begin_new, rescale_lambda, reset_lambda, restart
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.path_probe import Prober
from llamafactory_adaptive.training.run_log import Counters
from tests.helpers.dynamic import batch, start_plan
from tests.helpers.operations import counted, with_values, without_values
from tests.helpers.tiny import TARGETS, tiny_model


METHODS = {
    "igu": lambda: Igu(IguOptions()),
    "igu, published": lambda: Igu(IguOptions("published")),
    "adalora": lambda: Adalora(AdaloraOptions()),
    "elalora": lambda: Elalora(ElaloraOptions()),
    "tsq": lambda: Tsq(TsqOptions()),
    "tsq, steps": lambda: Tsq(TsqOptions(sensitivity_over="step")),
}


def lora(base, plan):
    return get_peft_model(base, LoraConfig(**lora_config_arguments(plan), task_type="CAUSAL_LM"))


class Run:
    """The adapter and the observer of a search as a run of one process has them; one component of each is masked."""

    def __init__(self, method, layers=2, device="cpu"):
        start = method.initial_adapter
        with with_values():
            base = tiny_model(num_hidden_layers=layers)
            plan = start_plan(base)
            self.model, self.inputs = lora(base, plan), batch()
        if device != "cpu":
            move(self.model, device)
            self.inputs = {key: torch.zeros(value.shape, dtype=value.dtype, device=device)
                           for key, value in self.inputs.items() if key != "attention_mask"}  # fmt: skip
        self.triplets = Triplets(self.model, plan, start.lambda_value, start.factors, seed=1)
        self.triplets.share_weights(self.model)
        self.method = method
        self.observe_from_here()

    @classmethod
    def on_cuda(cls, method):
        """A run whose tensors have no values, on a device that nobody has."""
        return cls(method, device="cuda")

    def observe_from_here(self):
        self.model.train()
        self.triplets.mask([[index != 1 for index in range(4)] for _ in self.triplets.modules])
        components = Components(self.triplets, UnpartitionedEngine())
        arguments = SimpleNamespace(fp16=False, average_tokens_across_devices=False, device=torch.device("cpu"))
        trainer = SimpleNamespace(model=self.model, args=arguments, current_gradient_accumulation_steps=1)
        self.components, self.step = components, 0
        self.observer = Observer(self.method, components, trainer, Counters(), 0, None)
        self.observer.stopwatch = Stopwatch(torch.device("cpu"))  # events need the device itself

    def forward(self):
        self.observer.begin(self.step, final=False)
        self.step += 1
        return self.model(**self.inputs).loss


# -- a device that is not there --------------------------------------------------------------------------------------
def move(model, device):
    """Give a model tensors of the mode that is active, on ``device``; ``to`` cannot while others refer to them."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                    own = tensors is module._parameters
                    tensors[name] = torch.nn.Parameter(new, tensor.requires_grad) if own else new


def put_gradients(run):
    """Gradients where a backward pass leaves them: none at lambda."""
    for module in run.triplets.modules:
        module.q.grad, module.p.grad = torch.randn_like(module.q), torch.randn_like(module.p)
    for lambda_r in (module.a.lambda_r for module in run.triplets.modules):
        if lambda_r is not None:
            lambda_r.grad = None


@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_on_an_accelerator_mixes_no_devices_and_waits_for_nothing(name):
    with without_values() as operations:
        run = Run.on_cuda(METHODS[name]())
        for step in range(3):
            operations.waits.clear()
            run.forward()
            waits_of_the_host = operations.waits.total()  # transformers' own, if any
            put_gradients(run)
            run.observer.before_step(final=False)
            looked = operations.waits.total() - waits_of_the_host
            assert looked == 0 or step == 0, operations.waits  # whether gradients arrive is read once
        with run.model.disable_adapter():
            operations.waits.clear()
            run.model(**run.inputs)
        assert operations.waits.total() == waits_of_the_host
        scores = run.components.scores(run.method, mean=not run.method.traits.relative)
        assert [len(row) for row in scores] == [4] * len(run.triplets.modules)
        assert all(p.grad.device.type == "cuda" for p in run.components.parameters)


def test_changes_of_components_on_an_accelerator_mix_no_devices():
    with without_values():
        for method in (METHODS["igu"](), METHODS["elalora"](), METHODS["tsq"]()):
            run = Run.on_cuda(method)
            states = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p), "step": torch.ones(())}
                      for p in run.components.parameters}  # fmt: skip
            components = Components(run.triplets, UnpartitionedEngine(optimizer=SimpleNamespace(state=states)))
            put_gradients(run)
            components.update(method, Orthogonality(0.5, "identity", relative=True))
            fresh = [[index == 1 for index in range(4)] for _ in run.triplets.modules]
            run.triplets.mask([[True] * 4 for _ in fresh])
            if isinstance(method, Tsq):
                restart(components, fresh, seed=1)
            elif isinstance(method, Elalora):
                begin_new(components, run.triplets.masks, fresh, method, seed=1)
            else:
                reset_lambda(components, fresh)
                rescale_lambda(components, Igu(IguOptions(importance="shrink", mend_strength=True)).shrinkage)
            assert all(p.device.type == "cuda" for p in components.parameters)
            saved = run.triplets.plain(run.model.state_dict())
            assert {value.device.type for key, value in saved.items() if ".lora_" in key} == {"cuda"}


def test_what_is_shown_of_samples_on_an_accelerator_mixes_no_devices(monkeypatch):
    taps = []
    monkeypatch.setattr(Tap, "apply", lambda x, output, take: taps.append((take, x, output)) or output)
    spec = TermSpec(1e-3, exact_drop=False, alignment="projected", dimensions=32, seed=0)
    with without_values():
        run = Run.on_cuda(METHODS["tsq, steps"]())
        layers = {m.name: (m.a, run.model.get_submodule(f"base_model.model.{m.name}").lora_B["default"])
                  for m in run.triplets.modules}  # fmt: skip
        recorder, moments = SampleGradientRecorder(layers, spec), SampleMoments(layers, 1)
        rows = len(run.inputs["input_ids"])
        recorder.batch_size, zeros = rows, torch.zeros(rows, device="cuda")
        recorder.squared_b, recorder.dots_b = zeros, zeros.clone()
        recorder.projected_bD = torch.zeros(rows, recorder.slots * recorder.per_factor, device="cuda")
        moments.begin()
        with ExitStack() as stack:
            for index, (name, (a, b)) in enumerate(layers.items()):
                recorder._attach(stack, f"{name}.A", 2 * index, a)
                recorder._attach(stack, f"{name}.B", 2 * index + 1, b)
            run.forward()
        assert len(taps) == 2 * 2 * len(layers)
        for take, x, output in taps:
            take(torch.randn_like(output), x.detach())
        assert recorder.squared_b.device.type == recorder.projected_bD.device.type == "cuda"
        assert all(moments.take(factor.weight).device.type == "cuda" for pair in layers.values() for factor in pair)


def test_extra_passes_on_an_accelerator_mix_no_devices(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr("llamafactory_adaptive.training.path_probe.random_state_kept", lambda device: ExitStack())
    with without_values():
        run = Run.on_cuda(METHODS["igu"]())
        prober = Prober(run.model, run.components, seed=0)
        prober.inputs = run.inputs
        gradients = prober.gradients([(0.5, 1.0), (1.0, 0.5)])
        assert {value.device.type for row in gradients for value in row} == {"cuda"}
        run.components.observe_given(run.method, gradients)


def test_calibration_on_an_accelerator_mixes_no_devices(monkeypatch):
    monkeypatch.setattr(input_moments, "spans_of", lambda mask: [(0, 10), (12, 30)])
    with without_values():
        with with_values():
            model = tiny_model()
        move(model, "cuda")
        modules = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS}
        ids = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        found = InputSecondMoments()(model, modules, [Batch(ids, torch.ones_like(ids), ids)] * 2)
        assert {(value.dtype, value.device.type) for value in found.values()} == {(torch.float64, "cpu")}
        weighted = second_moment_sum(torch.ones(6, 4, device="cuda"), [(0, 2)], torch.ones(6, device="cuda"))
        assert weighted.device.type == "cuda"


# -- operations beyond plain LoRA's ----------------------------------------------------------------------------------
def kernels_of_lora(layers):
    base, inputs = tiny_model(num_hidden_layers=layers), batch()
    model = lora(base, start_plan(base)).train()
    return counted(lambda: model(**inputs).loss.backward()).kernels.total()


def kernels_of_step(method, layers):
    """Kernels of the second step, from the forward pass to the gradients that the optimizer gets."""
    run = Run(method, layers)

    def step():
        run.forward().backward()
        run.observer.before_step(final=False)

    step()
    run.model.zero_grad()
    return counted(step).kernels.total()


# Sensitivities over samples take products of their own in every factor.
@pytest.mark.parametrize(
    ("name", "budget"), [("igu", 0.05), ("adalora", 0.05), ("elalora", 0.05), ("tsq, steps", 0.05), ("tsq", 0.35)]
)
def test_a_step_adds_few_kernels_to_those_of_lora(name, budget):
    """Counted with two and three layers; both counts are linear in the layers, and 32 have 224 modules."""
    plain, searching = ([count(layers) for layers in (2, 3)] for count in (
        kernels_of_lora, lambda layers: kernels_of_step(METHODS[name](), layers)))  # fmt: skip
    plain_32, searching_32 = (two + 30 * (three - two) for two, three in (plain, searching))
    assert plain_32 > 224 * 10
    added = searching_32 - plain_32
    assert added <= budget * plain_32, f"{added} kernels beyond the {plain_32} of LoRA"
