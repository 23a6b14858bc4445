"""Arguments of the command, checked before anything starts."""

import argparse

import pytest

from llamafactory_adaptive.comparison.request import (
    add_comparison_arguments,
    design_of,
    devices_in_words,
    devices_of,
    effect_of,
)
from llamafactory_adaptive.errors import AdaptiveConfigError


def arguments(*words):
    parser = argparse.ArgumentParser()
    add_comparison_arguments(parser)
    return parser.parse_args(["my.yaml", "--out", "x", *words])


def test_rates_lie_around_that_of_the_yaml():
    assert design_of(arguments(), 1e-4).rates == pytest.approx((2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4))
    assert design_of(arguments(), "2e-4").rates[2] == 2e-4
    assert design_of(arguments(), None).rates[2] == 5e-5, "the Trainer's own"
    assert design_of(arguments("--rates", "1e-3,2e-3"), 1e-4).rates == (1e-3, 2e-3)


def test_alphas_are_whole_numbers_as_adaptive_arms_take_no_others():
    assert design_of(arguments("--alphas", "8,16"), 1e-4).alphas == (8.0, 16.0)
    for text in ("8,12.5", "12.5", "0,8", "8,8"):
        with pytest.raises(AdaptiveConfigError, match=r"^--alphas: .* must be positive whole numbers, each once"):
            design_of(arguments("--alphas", text), 1e-4)


@pytest.mark.parametrize("rate", ["fast", [1e-4], -1.0, 0, float("nan")])
def test_a_rate_of_the_yaml_that_is_no_number_is_refused(rate):
    with pytest.raises(AdaptiveConfigError, match=r"learning_rate: .* is invalid: must be a positive number"):
        design_of(arguments(), rate)


@pytest.mark.parametrize(
    ("text", "visible", "kinds", "devices"),
    [
        (None, ("4", "5"), "aa", ["4", "5"]),
        (None, ("4", "5", "9"), "aa", ["4", "5"]),  # there is no ninth
        (None, ("4", "5", "6"), "aba", ["4", "6"]),
        (None, ("4", "5"), "ab", (None,)),
        (None, ("4",), "a", (None,)),
        (None, ("4", "5"), "", (None,)),  # use_cpu
        (None, (), "", (None,)),
        ("0,1", ("4", "5"), "ab", ["4", "5"]),
        ("1", ("GPU-a", "GPU-b"), "aa", ["GPU-b"]),
        ("GPU-b", ("GPU-a", "GPU-b"), "aa", ["GPU-b"]),
    ],
)
def test_devices_are_those_that_are_named_or_all_like_the_first(text, visible, kinds, devices):
    assert devices_of(text, visible, kinds) == devices


@pytest.mark.parametrize(
    ("text", "visible", "said"),
    [
        ("4", ("4", "5"), "4 is no visible device: there are 2, numbered from 0"),
        ("0", (), "0 is no visible device: there is no GPU"),
        ("GPU-c", ("GPU-a",), "GPU-c is no visible device"),
        ("0,0", ("4", "5"), "names a device twice"),
        ("0,GPU-a", ("GPU-a",), "names a device twice"),
    ],
)
def test_devices_that_are_not_there_are_refused(text, visible, said):
    with pytest.raises(AdaptiveConfigError, match=said):
        devices_of(text, visible)


@pytest.mark.parametrize(
    ("text", "threads", "devices"),
    [("cpu", 7, ["cpu:7"]), ("cpu,cpu", 7, ["cpu:3"] * 2), ("cpu, cpu,cpu", 3, ["cpu:1"] * 3)],
)
def test_runs_that_share_the_cpu_share_its_threads(text, threads, devices):
    assert devices_of(text, ("4",), "a", threads) == devices


@pytest.mark.parametrize(
    ("text", "threads", "said"),
    [
        ("cpu,0", 8, "names the CPU and others.*try --devices 0"),
        ("cpu,cpu,cpu", 2, "the CPU has 2 threads.*try --devices cpu,cpu$"),
    ],
)
def test_shares_of_the_cpu_that_cannot_be_are_refused(text, threads, said):
    with pytest.raises(AdaptiveConfigError, match=said):
        devices_of(text, ("4",), "a", threads)


def test_an_effect_is_a_share():
    assert (effect_of("0.5%"), effect_of("0.01")) == (pytest.approx(0.005), 0.01)


def test_gpus_that_are_taken_unasked_are_told_with_the_option_that_leaves_some_out():
    assert devices_in_words(None, ["0", "1", "2", "3"], 4) == (
        "runs take all 4 GPUs, one each at a time; --devices 0 keeps them on the first"
    )
    assert devices_in_words(None, (None,), 2) == (
        "runs take 1 of 2 GPUs: others differ from the first; --devices names any of them"
    )


@pytest.mark.parametrize(("text", "devices", "gpus"), [
    (None, (None,), 1), (None, (None,), 0), ("0", ["0"], 2), ("cpu,cpu", ["cpu:1"] * 2, 2),
])  # fmt: skip
def test_nothing_is_told_of_devices_that_were_named_or_left_no_choice(text, devices, gpus):
    assert devices_in_words(text, devices, gpus) == ""
