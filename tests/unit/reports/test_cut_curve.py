"""The curve over budgets: what it names and says, and how its losses are paired by row."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from llamafactory_adaptive.ranks.component_cuts import AdapterSpectrum, ModuleSpectrum
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.reports.cut_curve import CutCurve, HeldOutLosses


SPECTRUM = AdapterSpectrum(
    (
        ModuleSpectrum(ModuleShape("layers.0.up_proj", 4, 6), 16, tuple(0.5**i for i in range(4)) + (1e-3,) * 12),
        ModuleSpectrum(ModuleShape("layers.0.q_proj", 4, 4), 16, tuple(0.9**i for i in range(16))),
    ),
    1,
)
CUTS = [SPECTRUM.cut(budget) for budget in SPECTRUM.budgets(5)]
TOKENS = [4, 4, 4, 4]


def losses(means, noise=0.0, tokens=TOKENS, within=0.005):
    """Losses of the cuts with these means per token, row by row; noise is added to all cuts but the first."""
    rng = random.Random(1)
    by_row = [[mean * count + (rng.uniform(-noise, noise) if number else 0.0) for count in tokens]
              for number, mean in enumerate(means)]  # fmt: skip
    return HeldOutLosses("held", within, by_row, [3.0 * count for count in tokens], tokens)


def test_without_losses_the_knee_of_the_energy_is_named_and_said_to_be_no_loss():
    curve = CutCurve(Path("saves/my lora"), SPECTRUM, CUTS)
    said = curve.text()
    assert curve.named == SPECTRUM.knee()
    assert f"knee of the energy: {SPECTRUM.knee().parameters:,} parameters, as rank" in said
    assert "energy is not loss" in said
    assert f"llamafactory-adaptive shrink 'saves/my lora' --parameters {curve.named.parameters} --out" in said
    assert [line.split()[0] for line in said.splitlines()[2:7]] == [f"{cut.parameters:,}" for cut in CUTS]
    document = curve.to_json()
    kept = [point["kept_energy"] for point in document["points"]]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 1.0
    assert document["named_by"] == "energy"
    assert "loss" not in document["points"][0]


def test_with_losses_the_smallest_within_is_named():
    curve = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([1.0, 0.999, 1.004, 1.02, 1.3]))
    assert curve.named == CUTS[2]
    said = curve.text()
    assert "4 rows of held, 16 tokens: loss 1.0000 uncut, 3.0000 without the adapter" in said
    assert f"smallest within 0.50% of the uncut one's loss: {CUTS[2].parameters:,} parameters" in said
    assert "+0.40% (standard error 0.00%)" in said
    assert "warning" not in said
    assert said.splitlines()[4].split()[-1] == "100%"  # (3 - 1.004) / (3 - 1)
    assert said.splitlines()[6].split()[-1] == "85%"
    point = curve.to_json()["points"][3]
    assert point["gain_kept"] == pytest.approx(0.99)
    assert point["loss"] == pytest.approx(1.02)
    assert point["rise"] == pytest.approx(0.02)
    assert curve.to_json()["loss_without_adapter"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("means", "named"),
    [
        ([1.0, 1.004, 1.02, 1.003, 1.3], 1),
        ([1.0, 1.02, 1.003, 1.002, 1.001], 0),
        ([1.0, 1.001, 1.004, 1.005, 1.0], 4),
    ],
)
def test_a_cut_that_is_within_again_below_one_that_failed_is_not_named(means, named):
    curve = CutCurve(Path("lora"), SPECTRUM, CUTS, losses(means, within=0.006))
    assert curve.named == CUTS[named]
    assert curve.to_json()["named"]["parameters"] == CUTS[named].parameters


def test_where_no_cut_is_within_or_the_rows_are_too_few_it_is_said():
    none = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([1.0, 1.1, 1.2, 1.3, 1.4]))
    assert none.named == CUTS[0]
    assert "the next smaller adapter is not within 0.50% of the uncut one's loss" in none.text()
    assert "to cut to it" not in none.text()
    noisy = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([1.0] * 5, noise=0.5, within=0.2))
    assert "warning" not in noisy.text()
    doubtful = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([1.0] * 5, noise=0.5, within=0.05))
    assert "4 rows of held are too few to tell a difference of 5.00%; raise --samples" in doubtful.text()
    one_row = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([1.0] * 5, tokens=[4]))
    assert json.loads(json.dumps(one_row.to_json()))["points"][1]["rise_standard_error"] is None


def test_an_adapter_without_a_gain_is_told():
    curve = CutCurve(Path("lora"), SPECTRUM, CUTS, losses([3.0, 3.0, 3.1, 3.1, 3.2]))
    assert "warning: the base model alone is within 0.50%, too: the adapter gains less" in curve.text()
    assert curve.to_json()["points"][1]["gain_kept"] is None


def test_the_standard_error_is_that_of_paired_differences():
    equal = losses([2.0, 2.1], noise=0.3, tokens=[5] * 40)
    paired = [(cut - uncut) / 5 for cut, uncut in zip(equal.cuts_RN[1], equal.cuts_RN[0], strict=True)]
    expected = statistics.stdev(paired) / math.sqrt(40) / equal.uncut
    assert equal.rise_error(1) == pytest.approx(expected)
    assert equal.rise(1) == pytest.approx(statistics.fmean(paired) / equal.uncut)
    proportional = losses([2.0, 2.1], tokens=[1, 7, 3])  # longer rows lose more, each token alike
    assert proportional.rise_error(1) == pytest.approx(0.0, abs=1e-12)
    assert losses([2.0, 2.1], tokens=[3]).rise_error(1) == math.inf


def test_the_files_are_table_document_and_picture(tmp_path):
    for name, found in (("energy", None), ("loss", losses([1.0, 1.0, 1.01, 1.1, 1.2]))):
        (tmp_path / name).mkdir()
        CutCurve(Path("lora"), SPECTRUM, CUTS, found).save(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "rank_curve.txt", "rank_curve.json", "rank_curve.png",
        }  # fmt: skip
        assert (tmp_path / name / "rank_curve.png").read_bytes().startswith(b"\x89PNG")
