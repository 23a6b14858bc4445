"""Statistics of a model that accelerate has spread over several places are those of the model in one place."""

import pytest
import torch
from accelerate import dispatch_model

from llamafactory_adaptive.adapter.eva import InputDirections
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.devices import input_device, weights_present
from llamafactory_adaptive.calibration.gradient_projections import GradientProjections
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.calibration.row_losses import row_losses
from llamafactory_adaptive.methods.fisher import SampleFisher
from llamafactory_adaptive.methods.gora_ranks import WeightTimesGradient
from llamafactory_adaptive.methods.srlora import StableRanks
from tests.helpers.tiny import rows, tiny_model


ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
           "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
FIRST_ON_DISK = {**dict.fromkeys(ON_DISK, "cpu"), "model.embed_tokens": "disk", "model.layers.0": "disk"}
MEASUREMENTS = [
    InputSecondMoments(),
    InputSecondMoments("gradient"),
    GradientProjections(2, seed=3),
    WeightTimesGradient(),
    SampleFisher(),
    StableRanks(),
    InputDirections(2),
]


def targets(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def measured(measurement, model):
    batches = [batch.to(input_device(model)) for batch in make_batches(rows(6), 3, 258)]
    return measurement(model, targets(model), batches)


@pytest.mark.parametrize("places", [ON_DISK, FIRST_ON_DISK], ids=["last on disk", "first on disk"])
@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda measurement: measurement.key)
def test_the_result_is_that_of_one_device(measurement, places, tmp_path):
    whole = measured(measurement, tiny_model())
    spread = dispatch_model(tiny_model(), places, offload_dir=str(tmp_path))
    layer = "model.layers.1" if places is ON_DISK else "model.layers.0"
    assert spread.get_submodule(f"{layer}.mlp.up_proj").weight.device.type == "meta"
    found = measured(measurement, spread)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_losses_of_rows_are_those_of_one_device(tmp_path):
    batches = make_batches(rows(4), 2, 258)
    spread = dispatch_model(tiny_model(), FIRST_ON_DISK, offload_dir=str(tmp_path))
    assert torch.equal(row_losses(spread, batches), row_losses(tiny_model(), batches))


def test_inputs_go_where_the_model_computes_and_not_where_weights_are_kept(tmp_path):
    assert input_device(tiny_model()) == torch.device("cpu")
    assert input_device(torch.nn.ReLU()) == torch.device("cpu")
    assert input_device(dispatch_model(tiny_model(), FIRST_ON_DISK, offload_dir=str(tmp_path))) == torch.device("cpu")
    assert input_device(tiny_model().to("meta")) == torch.device("cpu")


def test_weights_on_disk_are_there_while_they_are_read(tmp_path):
    whole, spread = tiny_model(), dispatch_model(tiny_model(), ON_DISK, offload_dir=str(tmp_path))
    name = "model.layers.1.mlp.up_proj"
    with weights_present(spread.get_submodule(name)):
        assert torch.equal(spread.get_submodule(name).weight, whole.get_submodule(name).weight)
    assert spread.get_submodule(name).weight.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda measurement: measurement.key)
def test_gpus_and_cpu_share_a_model(measurement, tmp_path):
    last = torch.cuda.device_count() - 1
    places = {**ON_DISK, "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": last,
              "model.layers.1": "cpu", "model.norm": last, "lm_head": last}  # fmt: skip
    whole = measured(measurement, tiny_model().to(0))
    found = measured(measurement, dispatch_model(tiny_model(), places, offload_dir=str(tmp_path)))
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=1e-6)
