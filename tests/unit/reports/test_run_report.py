"""What a person reads of a finished run."""

from llamafactory_adaptive.reports.run_report import Run, run_text
from tests.helpers.plans import found_plan


def test_the_report_of_one_run_has_its_losses(tmp_path):
    run = Run(tmp_path, found_plan(), 30, 1.5, 1.25, 60.0, 3.0, losses=(3.0, 0.5, 1.0), eval_losses=(1.2, 1.25))
    said = run_text(run)
    assert "first 3.0000, last 1.0000, lowest 0.5000, mean 1.5000" in said
    assert "evaluation loss       last 1.2500, lowest 1.2000" in said
    assert "60.0, finding ranks and scoring samples 3.0 (5.0% of it)" in said
