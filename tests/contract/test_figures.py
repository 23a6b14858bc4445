"""README quotes what the result files hold, and the result files say how they came about."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


ROWS = {
    "scoring over one forward pass of the same tokens": ("calibration", "time_ratio", "{:.2f} x"),
    "the same, over a forward pass that also skips the output head": (
        "calibration",
        "time_ratio_without_head",
        "{:.2f} x",
    ),
    "peak memory of scoring over a forward pass |": ("calibration", "memory_ratio", "{:.2f} x"),
    "peak memory of scoring over a forward pass that": ("calibration", "memory_ratio_without_head", "{:.2f} x"),
    "Kendall's tau of scores": ("calibration", "tau", "{:.3f}"),
    "scores against a recomputation": ("recomputation", "theta_largest_relative_difference", "{:.1%}"),
    "Kendall's tau between scores and ranks": ("recomputation", "tau_theta_ranks", "{:.2f}"),
    "rank against its water-filled": ("recomputation", "largest_distance_from_water_filled_share", "{:.2f} ranks"),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_readme_quotes_the_results(row):
    benchmark, key, pattern = ROWS[row]
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    assert line.split("|")[2].strip() == pattern.format(RESULTS[benchmark]["results"][key])


@pytest.mark.parametrize("name", list(RESULTS))
def test_results_name_command_date_and_versions(name):
    result = RESULTS[name]
    assert result["command"].startswith("python benchmarks/")
    assert result["date"]
    assert set(result["versions"]) >= {"llamafactory", "torch", "peft", "llamafactory-adaptive"}
