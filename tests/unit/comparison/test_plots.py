import re

import pytest

from llamafactory_adaptive.comparison.plots import forest_plot, rate_curves


RATES = (0.001, 0.002, 0.004, 0.016)


def drawn(*losses, other=(), unstable=()):
    """Draw the curve of an arm, or of two, and list the texts of the picture."""
    left_out = [{"rate": rate, "alpha": None} for rate in unstable]
    arms = [{"name": name, "unstable": left_out, "curve": [{"rate": rate, "alpha": None, "dev_loss": loss}
                                     for rate, loss in zip(RATES, of_arm, strict=False)]}
            for name, of_arm in (("lora", losses), ("igu", other)) if of_arm]  # fmt: skip
    return re.findall(r">([^<>\n]+)</text>", rate_curves(arms))


@pytest.mark.parametrize("diverged", [0.62, None])
def test_each_rate_that_was_tried_has_its_label(diverged):
    assert [text for text in drawn(0.6, 0.61, diverged, 0.63) if text in {str(rate) for rate in RATES}] == [
        "0.001", "0.002", "0.004", "0.016"]  # fmt: skip


@pytest.mark.parametrize(("worst", "said"), [(0.68, False), (0.70, True), (8.0, True)])
def test_losses_far_above_the_lowest_are_cut_off_and_this_is_said(worst, said):
    texts = drawn(0.62, 0.6, None, worst)
    assert ("(above 0.69 not shown)" in texts) is said
    ticks = [float(text) for text in texts if re.fullmatch(r"\d\.\d+", text) and float(text) > 0.1]
    assert max(ticks) <= 0.69
    assert min(ticks) >= 0.58


@pytest.mark.parametrize(("unstable", "marked"), [((), 0), ((0.002,), 1), ((0.001, 0.002), 1)])
def test_points_that_are_left_out_have_a_mark_that_is_explained(unstable, marked):
    texts = drawn(0.6, 0.61, 0.62, 0.63, unstable=unstable)
    assert texts.count("left out: diverged with another seed") == marked


def test_the_best_loss_of_each_arm_is_shown():
    assert "(above 0.909 not shown)" in drawn(0.62, 0.6, 0.61, 8.0, other=(0.95, 0.9, 1.4))


def test_a_curve_without_a_finite_loss_is_drawn_empty():
    assert "loss on the rows that choose" in drawn(None, None, None, None)


def difference(name, low, high):
    relative = {"value": (low + high) / 2, "low": low, "high": high}
    return {"name": name, "verdicts": {"lora": {"verdict": "not decided", "difference": {"relative": relative}}}}


@pytest.mark.parametrize(("far", "cut"), [(0.09, False), (0.5, True), (29.0, True)])
def test_an_interval_far_wider_than_most_is_cut_off_and_this_is_said(far, cut):
    arms = [difference("random", -0.02, 0.03), difference("igu", -0.01, far), difference("tsq", -0.03, 0.02)]
    texts = re.findall(r">([^<>\n]+)</text>", forest_plot(arms, 0.005))
    assert any("arrows go on beyond the edge" in text for text in texts) is cut
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts if re.fullmatch(r"\W?[\d.]+", text)]
    assert max(map(abs, ticks)) <= 12.0, "four times three per cent"
