"""Arguments of ``llamafactory-adaptive shrink``; standard library only, so that the command line starts quickly."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamafactory_adaptive.errors import Problem, refuse_all
from llamafactory_adaptive.export.request import out_problems
from llamafactory_adaptive.options import parse_share
from llamafactory_adaptive.paths import path_argument


WITHIN = 0.005
SAMPLES = 256


@dataclass(frozen=True)
class ShrinkRequest:
    """A cut, or a curve over several cuts, as the user asked for it.

    Attributes:
        rank: the budget as the rank of a uniform adapter of the same modules.
        parameters: the budget as a number of parameters.
        energy: the budget as the share of the sum of squared singular values to keep.
        curve: whether several budgets are compared and none is cut to.
        min_rank: the fewest components that a module keeps.
        data: name of a data set whose loss is taken with each cut of a curve.
        config: the YAML that names model and template for it.
        overrides: settings that replace those of the YAML, each as ``key=value``.
        within: allowed increase of that loss, as a share.
        samples: number of rows.
    """

    adapter: Path
    out: Path
    rank: int | None = None
    parameters: int | None = None
    energy: float | None = None
    curve: bool = False
    min_rank: int = 1
    data: str | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    within: float | None = None
    samples: int | None = None

    @property
    def budget(self) -> dict[str, int | float]:
        """Return the one budget that was asked for, by the name of its option; empty for a curve."""
        asked = {"rank": self.rank, "parameters": self.parameters, "energy": self.energy}
        return {key: value for key, value in asked.items() if value is not None}


def add_shrink_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the shrink command to a parser."""
    parser.add_argument(
        "adapter", type=path_argument, metavar="ADAPTER", help="folder of a trained LoRA adapter, e.g. saves/lora"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--rank", type=int, metavar="R",
        help="keep as many parameters as a uniform adapter of this rank has on the same modules, e.g. 8",
    )  # fmt: skip
    budget.add_argument("--parameters", type=int, metavar="N", help="keep at most so many parameters, e.g. 2000000")
    budget.add_argument(
        "--energy", type=share_argument, metavar="SHARE",
        help="keep this share of the sum of squared singular values of all modules, e.g. 0.95 or 95%%",
    )  # fmt: skip
    budget.add_argument(
        "--curve", action="store_true",
        help="cut to nothing, but show what five budgets keep, from the whole adapter down, e.g. --curve --out curve",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR",
        help="new folder for the cut adapter or for the curve, e.g. saves/lora-8",
    )  # fmt: skip
    parser.add_argument(
        "--min-rank", type=int, default=1, metavar="R",
        help="fewest components that a module keeps, e.g. 0, which lets modules lose their adapter (default: 1)",
    )  # fmt: skip
    _add_loss_arguments(parser)


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="NAME",
        help="with --curve: a data set of held-out rows, by its name in dataset_info.json, e.g. my_test; the loss of "
        "each budget is taken on it; with the training set of a YAML that has a val_size, on the rows it held out",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=path_argument, metavar="X.yaml",
        help="with --data: the LLaMA-Factory YAML that the adapter was trained with, e.g. my.yaml; it names model, "
        "template and dataset_dir",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="with --config: settings that replace those of the file, as on the run's command line, e.g. seed=1",
    )  # fmt: skip
    parser.add_argument(
        "--within", type=share_argument, metavar="SHARE",
        help="with --data: by how much the held-out loss may rise over that of the uncut adapter, e.g. 0.5%% "
        "(the default) or 0.01",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=int, metavar="N", help=f"with --data: number of rows, e.g. 1000 (default: {SAMPLES})"
    )


def share_argument(text: str) -> float:
    """Convert ``0.95`` or ``95%`` to a number.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    try:
        return parse_share(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no share; write 0.95 or 95%") from None


def shrink_request(arguments: argparse.Namespace) -> ShrinkRequest:
    """Convert parsed arguments to a checked request.

    Raises:
        AdaptiveConfigError: options do not fit together, or a value is not allowed.
    """
    request = ShrinkRequest(**{name: getattr(arguments, name) for name in ShrinkRequest.__dataclass_fields__})
    refuse_all(*_problems(request))
    return request


def _problems(request: ShrinkRequest) -> list[Problem]:
    problems = out_problems(request.out, f"--out saves/{request.adapter.resolve().name}-cut")
    for key, least, example in (("rank", 1, 8), ("parameters", 1, 1000000), ("min_rank", 0, 1), ("samples", 1, 256)):
        value = getattr(request, key)
        if value is not None and value < least:
            words = f"must be a whole number of at least {least}"
            problems.append(Problem(key, value, words, f"--{key.replace('_', '-')} {example}"))
    if request.energy is not None and not 0 < request.energy <= 1:
        words = "must be a share above 0 and at most 1 of the squared singular values"
        problems.append(Problem("energy", request.energy, words, "--energy 0.95"))
    if request.within is not None and not (math.isfinite(request.within) and request.within >= 0):
        words = "must be a share of the loss, 0 or more"
        problems.append(Problem("within", request.within, words, "--within 0.5%"))
    return problems + _lonely_options(request)


def _lonely_options(request: ShrinkRequest) -> list[Problem]:
    """Find options of the held-out loss that lack what they belong to."""
    problems = []
    if request.data is not None and request.config is None:
        words = "a data set is read as a YAML says, which names model and template"
        problems.append(Problem("data", request.data, words, "--config with the YAML of the training"))
    if request.data is None:
        for key in ("config", "within", "samples"):
            if (value := getattr(request, key)) is not None:
                shown = str(value) if isinstance(value, Path) else value
                problems.append(Problem(key, shown, "it is about a held-out loss", "--data NAME with it"))
        if request.overrides:
            words = "it replaces a setting of the YAML that a held-out loss is taken with"
            problems.append(Problem("key=value", " ".join(request.overrides), words, "--data NAME --config X.yaml"))
    elif not request.curve:
        words = "losses are taken for a curve over several budgets"
        problems.append(Problem("data", request.data, words, "--curve in place of the budget"))
    return problems
