"""The state of a search comes back from its checkpoint bit for bit, into a search that had gone elsewhere."""

import ast
import json
from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import STATE_JSON
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.search_config import PruningConfig
from llamafactory_adaptive.training.checkpoint import read_state
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.probe_budget import ProbeBudget
from llamafactory_adaptive.training.rank_search import RankSearchState
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.search_checkpoint import SearchCheckpoint
from llamafactory_adaptive.training.whole_state import component_state, owned_state
from tests.helpers.dynamic import scatter, start_plan, stream, triplet_model
from tests.helpers.tiny import tiny_model
from tests.helpers.workers import said_by_two


ARGS = SimpleNamespace(should_save=True)
STEPS = 8
SCHEDULE = PruningConfig(4, warmup_ratio=0.0, final_ratio=0.5, interval=2, max_overhead=None, seed=0)
CONFIG = AdaptiveConfig("igu", {"importance": "off", "uncertainty": "product"}, "params", 2, 4.0, 1, 8, None,
                        CalibrationConfig(None, 0, 0, 0), SCHEDULE)  # fmt: skip
OF_COMPONENTS = {"importance": "off", "uncertainty": "mean"}


class Search:
    """A search that has run for some steps: factors, masks, running statistics and a decision of its own."""

    def __init__(self, seed, holds_factors=True, interval=2, engine=None, options=CONFIG.options, **sizes):
        _, self.triplets, components = triplet_model(**sizes)
        if engine is not None:
            components = Components(self.triplets, engine)
        method, self.log, self.budget = make_method("igu", options), RunLog("igu", 2.5), ProbeBudget(None)
        state = RankSearchState(start_plan(tiny_model(**sizes)), CONFIG)
        for _ in stream(self.triplets, 3, seed):
            components.update(method, None)
        scatter(self.triplets, seed)
        self.masks = [[(i + j + seed) % 2 == 0 for j in range(4)] for i in range(len(self.triplets.modules))]
        ones = [[1.0] * 4 for _ in self.masks]
        state.record(2, 99, False, ones, [[True] * 4 for _ in self.masks], self.masks)
        self.triplets.mask(self.masks)
        self.log.counters.observations, self.log.counters.steps, self.log.counters.modules_checked = 5 + seed, 6, 14
        self.budget.load({"probing": 1.5, "training": 9.0 + seed, "probes": 2, "steps": 6, "next_step": 7})
        search = SimpleNamespace(state=state, triplets=self.triplets, request=SimpleNamespace(method=method))
        search.set_strength = lambda: None
        observer = SimpleNamespace(components=components, probe_budget=self.budget)
        self.method, self.state = method, state
        self.checkpoint = SearchCheckpoint(search, observer, self.log, holds_factors, interval)

    def factors(self):
        return {f"{kind}.{module.name}": parameter.detach().clone()
                for module in self.triplets.modules for kind, parameter in module.parameters().items()}  # fmt: skip

    def write(self, folder, args=ARGS):
        self.checkpoint.write(folder, args, SimpleNamespace(global_step=6, max_steps=STEPS))
        return folder


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_resumed_search_is_the_one_that_was_written(tmp_path):
    written, resumed = Search(0), Search(1)
    factors, statistics = written.factors(), {key: value.clone() for key, value in written.method.state().items()}
    assert not equal(factors, resumed.factors()), "the other search had gone elsewhere"
    assert statistics, "there is something to store"
    assert not equal(statistics, resumed.method.state())
    resumed.checkpoint.resume(written.write(tmp_path / "checkpoint-6"), STEPS)
    assert equal(resumed.factors(), factors)
    assert equal(resumed.method.state(), statistics)
    assert resumed.triplets.masks == written.masks
    assert resumed.state.state() == written.state.state()
    assert resumed.budget.state() == written.budget.state()
    assert resumed.log.overhead_seconds == 2.5 + 2.5, "planning of this process, and what went before"
    assert resumed.log.overhead == {"planning": 5.0}
    counters = resumed.log.counters
    assert (counters.observations, counters.probes, counters.allocations, counters.steps) == (5, 0, 0, 6)


def test_seconds_of_a_checkpoint_that_told_only_their_sum_count_too(tmp_path):
    folder = Search(0).write(tmp_path / "checkpoint-6")
    document = json.loads((folder / STATE_JSON).read_text())
    del document["overhead"]
    (folder / STATE_JSON).write_text(json.dumps(document))
    (resumed := Search(1)).checkpoint.resume(folder, STEPS)
    assert resumed.log.overhead == {"planning": 2.5, "before": 2.5}


def test_seconds_of_a_run_go_on_where_it_is_resumed(tmp_path):
    (search := Search(0)).log.seconds_before = 100.0
    folder = search.write(tmp_path / "checkpoint-6")
    (resumed := Search(1)).checkpoint.resume(folder, STEPS)
    assert 100.0 <= resumed.log.seconds < 1000.0


def test_masks_in_force_are_those_that_were_written(tmp_path):
    written, resumed = Search(0), Search(1)
    resumed.checkpoint.resume(written.write(tmp_path / "checkpoint-6"), STEPS)
    assert [module.a.mask_r.bool().tolist() for module in resumed.triplets.modules] == written.masks


def test_the_file_says_what_a_reader_needs(tmp_path):
    written = Search(0)
    document = json.loads((written.write(tmp_path / "checkpoint-6") / STATE_JSON).read_text())
    assert (document["step"], document["total_steps"], document["overhead_seconds"]) == (6, STEPS, 2.5)
    assert list(document["masks"]) == [module.name for module in written.triplets.modules]
    assert list(document["masks"].values())[:2] == ["1010", "0101"]
    assert document["thinner"] == written.budget.state(), "files keep this key's name"
    assert document["counters"]["observations"] == 5


def test_factors_that_deepspeed_stores_are_neither_written_nor_restored(tmp_path):
    written, resumed = Search(0, holds_factors=False), Search(1, holds_factors=False)
    folder, own = written.write(tmp_path / "checkpoint-6"), resumed.factors()
    tensors, _ = read_state(folder, partitioned=False)
    assert {name.partition(".")[0] for name in tensors} == {"method"}
    resumed.checkpoint.resume(folder, STEPS)
    assert equal(resumed.factors(), own)
    assert resumed.triplets.masks == written.masks


def test_the_state_of_other_modules_is_refused_before_anything_is_restored(tmp_path):
    folder, other = Search(0).write(tmp_path / "checkpoint-6"), Search(1, num_hidden_layers=1)
    factors = other.factors()
    with pytest.raises(PlanError, match=r"checkpoint-6 holds the state of other modules; use another output_dir"):
        other.checkpoint.resume(folder, STEPS)
    assert equal(other.factors(), factors)


def test_a_run_of_another_length_resumes_only_once_ranks_are_final(tmp_path):
    written, resumed = Search(0), Search(1)
    folder = written.write(tmp_path / "checkpoint-6")
    with pytest.raises(PlanError, match=r"belongs to a run of 8 steps and this one has 9: .* set max_steps"):
        resumed.checkpoint.resume(folder, 9)
    written.state.final = True
    resumed.checkpoint.resume(written.write(folder), 9)
    assert resumed.state.final


def test_epochs_of_another_length_are_refused_until_ranks_are_final(tmp_path):
    written, resumed = Search(0), Search(1, interval=3)
    folder, factors = written.write(tmp_path / "checkpoint-6"), resumed.factors()
    with pytest.raises(PlanError, match=r"every 2 steps and this one does every 3: adaptive_interval_epochs is a sh"):
        resumed.checkpoint.resume(folder, STEPS)
    assert equal(resumed.factors(), factors)
    written.state.final = True
    resumed.checkpoint.resume(written.write(folder), STEPS)
    assert resumed.state.final


class Pieces(UnpartitionedEngine):
    """An engine like ZeRO's: every process owns an equal part of each flattened parameter, the last what is left."""

    partitioned = True

    def __init__(self, rank, processes):
        super().__init__()
        self.rank, self.processes = rank, processes

    def piece(self, parameter):
        share = -(-parameter.numel() // self.processes)
        start = min(self.rank * share, parameter.numel())
        return start, min(share, parameter.numel() - start)

    def _cut(self, tensors, parameters):
        pieces = map(self.piece, parameters)
        flat = [tensor.detach().view(-1) for tensor in tensors]
        return [tensor[start : start + length] for tensor, (start, length) in zip(flat, pieces, strict=True)]

    def weights(self, parameters):
        return self._cut(super().weights(parameters), parameters)

    def gradients(self, parameters):
        return self._cut(super().gradients(parameters), parameters)


def keep_pieces(rank, folder, whole):
    """What two processes that own pieces of one search write together, and what each reads of a whole state."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    written = Search(0, holds_factors=False, engine=Pieces(rank, 2))
    written.write(folder, SimpleNamespace(should_save=rank == 0))
    same = []
    for place in (folder, whole):
        resumed = Search(1, holds_factors=False, engine=Pieces(rank, 2))
        resumed.checkpoint.resume(place, STEPS)
        same.append(equal(resumed.method.state(), written.method.state()) and resumed.triplets.masks == written.masks)
    held = sum(value.numel() for value in written.method.state().values())
    dist.destroy_process_group()
    return [same, held]


def keep_component_means(rank, folder, whole):
    """What two processes that own pieces of one search keep of components, and what each reads back."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    written = Search(0, holds_factors=False, engine=Pieces(rank, 2), options=OF_COMPONENTS)
    written.write(folder, SimpleNamespace(should_save=rank == 0))
    same = []
    for place in (folder, whole):
        resumed = Search(1, holds_factors=False, engine=Pieces(rank, 2), options=OF_COMPONENTS)
        resumed.checkpoint.resume(place, STEPS)
        close = equal if place == folder else nearly_equal
        same.append(close(resumed.method.state(), written.method.state()) and resumed.triplets.masks == written.masks)
    scores = written.checkpoint.observer.components.scores(written.method)
    dist.destroy_process_group()
    return [same, [round(sum(row), 6) for row in scores]]


def nearly_equal(first, second):
    return first.keys() == second.keys() and all(torch.allclose(first[key], second[key]) for key in first)


def test_means_over_components_are_whole_on_every_process(tmp_path):
    """They are added up at each step: no process holds a part, and scores need no sum."""
    alone = Search(0, holds_factors=False, options=OF_COMPONENTS)
    whole, state = alone.write(tmp_path / "alone"), alone.method.state()
    scores = alone.checkpoint.observer.components.scores(alone.method)
    said = said_by_two(keep_component_means, tmp_path / "pieces", whole)
    assert said == [str([[True, True], [round(sum(row), 6) for row in scores]])] * 2
    tensors, _ = read_state(tmp_path / "pieces", partitioned=False)
    assert nearly_equal(tensors, {f"method.{name}": value for name, value in state.items()})
    kept = sum(value.numel() for value in state.values() if value.dim())
    assert kept == sum(3 * 4 for _ in alone.triplets.modules)


def average_old_pieces(rank, whole):
    """Means over components, from pieces of elements as earlier versions stored them."""
    from torch import distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    components = Search(0, engine=Pieces(rank, 2), options=OF_COMPONENTS).checkpoint.observer.components
    found = component_state(components, owned_state(components, whole), whole=False)
    dist.destroy_process_group()
    return {name: value.tolist() for name, value in sorted(found.items())}


def test_what_earlier_versions_kept_of_elements_is_averaged():
    """The state of S alone held a number per element; an equal run that keeps one per component holds their means."""
    search = Search(0, options=OF_COMPONENTS)
    components, new = search.checkpoint.observer.components, search.method.state()
    old = dict(new)
    generator = torch.Generator().manual_seed(4)
    for block in components.blocks:
        noise = torch.rand(len(block.modules), *block.shape, generator=generator)
        noise -= block.spread(block.by_component(noise)).view(noise.shape)
        spread = block.spread(new[f"mean.{block.name}"]).view(noise.shape)
        old[f"mean.{block.name}"] = (spread + noise).reshape(-1)
    found = component_state(components, old, whole=True)
    assert found.keys() == new.keys()
    assert all(torch.allclose(found[name], new[name], atol=1e-6) for name in new)
    expected = {name: value.tolist() for name, value in sorted(found.items())}
    for text in said_by_two(average_old_pieces, old):
        told = ast.literal_eval(text)
        assert told.keys() == expected.keys()
        for name, values in told.items():
            assert torch.allclose(torch.tensor(values), torch.tensor(expected[name]), atol=1e-6)


def test_a_state_in_pieces_is_written_whole_and_read_under_any_engine(tmp_path):
    """ZeRO to one process or DDP, and back: the state is bit for bit that of one process that owns everything."""
    alone = Search(0, holds_factors=False)
    whole = alone.write(tmp_path / "alone")
    state = alone.method.state()
    elements = sum(value.numel() for value in state.values() if value.dim())
    said = said_by_two(keep_pieces, tmp_path / "pieces", whole)
    assert [text.startswith("[[True, True], ") for text in said] == [True, True], said
    assert [0 < int(text.rstrip("]").rpartition(" ")[2]) < elements for text in said] == [True, True], said
    assert [path.name for path in (tmp_path / "pieces").glob("*.safetensors")] == ["adaptive_state.safetensors"]
    tensors, document = read_state(tmp_path / "pieces", partitioned=False)
    assert equal(tensors, {f"method.{name}": value for name, value in state.items()})
    assert (document["partitioned"], document["processes"]) == (False, 2)
    resumed = Search(1, holds_factors=False)
    resumed.checkpoint.resume(tmp_path / "pieces", STEPS)
    assert equal(resumed.method.state(), state)


def test_a_checkpoint_that_does_not_tell_its_interval_is_taken_as_it_is(tmp_path):
    folder = Search(0).write(tmp_path / "checkpoint-6")
    path = folder / STATE_JSON
    document = json.loads(path.read_text())
    del document["interval"]
    path.write_text(json.dumps(document))
    Search(1, interval=3).checkpoint.resume(folder, STEPS)
