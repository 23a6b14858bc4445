"""What several budgets keep of a trained adapter: a table, a JSON document and a picture with the knee.

Kept energy is the share of the sum of squared singular values; it is not the loss. Where held-out losses were taken,
all cuts saw the same rows, and differences are paired by row: where the loss of row i, summed over its t_i tokens, is
d_i above that of the uncut adapter, D = sum d_i / sum t_i, with the standard error of a ratio of two sums over n rows,
sqrt(n / (n-1) sum (d_i - D t_i)^2) / sum t_i (Cochran, Sampling Techniques, 1977, section 6.4).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from llamafactory_adaptive.files import write_atomically
from llamafactory_adaptive.ranks.component_cuts import AdapterSpectrum, Cut
from llamafactory_adaptive.reports.plaintext import plain
from llamafactory_adaptive.reports.plots import new_figure, save_figure
from llamafactory_adaptive.reports.tables import align


CURVE_STEM = "rank_curve"  # of the files .txt, .json and .png
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses of an adapter at several cuts, over the same rows.

    Attributes:
        data: name of the data set.
        within: allowed rise over the uncut adapter, as a share.
        cuts_RN: per cut, the loss of each row, summed over its tokens; the uncut adapter first.
        base_N: the same of the base model alone.
        tokens_N: number of tokens of each row that take a loss.
    """

    data: str
    within: float
    cuts_RN: Sequence[Sequence[float]]
    base_N: Sequence[float]
    tokens_N: Sequence[int]

    def mean(self, losses_N: Sequence[float]) -> float:
        """Compute the mean loss per token."""
        return math.fsum(losses_N) / sum(self.tokens_N)

    @cached_property
    def uncut(self) -> float:
        """Return the mean loss of the uncut adapter."""
        return self.mean(self.cuts_RN[0])

    def rise(self, number: int) -> float:
        """Compute by which share of the uncut adapter's loss a cut is above it."""
        return self.mean(self.cuts_RN[number]) / self.uncut - 1.0

    def rise_error(self, number: int) -> float:
        """Compute the standard error of a cut's rise over the rows; infinite for a single row."""
        rows = len(self.tokens_N)
        if rows < 2:
            return math.inf
        d_N = [cut - uncut for cut, uncut in zip(self.cuts_RN[number], self.cuts_RN[0], strict=True)]
        slope = math.fsum(d_N) / sum(self.tokens_N)
        spread = math.fsum((d - slope * t) ** 2 for d, t in zip(d_N, self.tokens_N, strict=True))
        return math.sqrt(spread * rows / (rows - 1)) / sum(self.tokens_N) / self.uncut

    def gain_kept(self, number: int) -> float | None:
        """Compute which share of the adapter's gain over the base model a cut keeps; None if there is no gain."""
        base = self.mean(self.base_N)
        gain = base - self.uncut
        return (base - self.mean(self.cuts_RN[number])) / gain if gain > 0 else None

    def words(self, size: str) -> list[str]:
        """Describe the rows and the smallest cut within the allowed loss, of the given size, a line each."""
        number, rows = self.smallest(), f"{len(self.tokens_N)} rows of {plain(self.data)}"
        alone = f"{self.mean(self.base_N):.4f} without the adapter"
        lines = [f"{rows}, {sum(self.tokens_N):,} tokens: loss {self.uncut:.4f} uncut, {alone}"]
        if self.mean(self.base_N) <= self.uncut * (1.0 + self.within):
            lines.append(f"warning: the base model alone is within {self.within:.2%}, too: the adapter gains less")
        if number == 0:
            return [*lines, f"the next smaller adapter is not within {self.within:.2%} of the uncut one's loss"]
        rise = f"{self.rise(number):+.2%} (standard error {self.rise_error(number):.2%})"
        lines.append(f"smallest within {self.within:.2%} of the uncut one's loss: {size}, {rise}")
        if self.rise_error(number) > self.within / 2:
            lines.append(f"warning: {rows} are too few to tell a difference of {self.within:.2%}; raise --samples")
        return lines

    def smallest(self) -> int:
        """Return the number of the smallest cut up to which no loss has risen by more than is allowed.

        A smaller one that is within again, after one that is not, owes that to chance as a rule.
        """
        within = [self.rise(number) <= self.within for number in range(1, len(self.cuts_RN))]
        return [*within, False].index(False)


@dataclass(frozen=True)
class CutCurve:
    """Cuts of one adapter to falling budgets, the whole adapter first, and their held-out losses if there are any."""

    adapter: Path
    spectrum: AdapterSpectrum
    cuts: Sequence[Cut]
    losses: HeldOutLosses | None = None

    @cached_property
    def named(self) -> Cut:
        """Return the cut that the curve names: the smallest within the allowed loss, or the knee of the energy."""
        return self.spectrum.knee() if self.losses is None else self.cuts[self.losses.smallest()]

    def as_rank(self, cut: Cut) -> float:
        """Return the rank of a uniform adapter of as many parameters."""
        return cut.parameters / self.spectrum.uniform(1)

    def text(self) -> str:
        """Format the curve as tables, with a verdict and the command that cuts to it."""
        full = self.spectrum.parameters
        return "\n".join(
            [
                f"Cuts of {plain(str(self.adapter))} ({full:,} parameters, {len(self.spectrum.modules)} modules)",
                *align(self._rows()),
                "",
                "Kept energy by module type",
                *align(self._type_rows()),
                "",
                *self._verdict(),
            ]
        )

    def _rows(self) -> list[list[str]]:
        rows = [["parameters", "of the whole", "as rank", "ranks", "kept energy"]]
        for cut in self.cuts:
            share = cut.parameters / self.spectrum.parameters
            ranks = f"{min(cut.ranks)}-{max(cut.ranks)}"
            rows.append([f"{cut.parameters:,}", f"{share:.1%}", f"{self.as_rank(cut):.1f}", ranks,
                         f"{cut.kept_share:.2%}"])  # fmt: skip
        if (losses := self.losses) is not None:
            rows[0] += ["loss", "over the uncut", "standard error", "gain kept"]
            for number, row in enumerate(rows[1:]):
                gain = losses.gain_kept(number)
                row += [f"{losses.mean(losses.cuts_RN[number]):.4f}", f"{losses.rise(number):+.2%}",
                        f"{losses.rise_error(number):.2%}", "none" if gain is None else f"{gain:.0%}"]  # fmt: skip
        return rows

    def _type_rows(self) -> list[list[str]]:
        by_type = [cut.kept_by_type() for cut in self.cuts]
        head = ["module type", *(f"as rank {self.as_rank(cut):.1f}" for cut in self.cuts)]
        return [head, *([plain(kind), *(f"{kept[kind]:.1%}" for kept in by_type)] for kind in by_type[0])]

    def _verdict(self) -> list[str]:
        """Describe the cut that the curve names, the reason, and the command that makes it, a line each."""
        size = f"{self.named.parameters:,} parameters, as rank {self.as_rank(self.named):.1f}"
        if self.losses is not None:
            named = self.losses.smallest()
            return [*self.losses.words(size), *([self._command()] if named else [])]
        return [
            f"knee of the energy: {size}; a further component keeps less than the average of its parameters",
            "energy is not loss: --data NAME --config X.yaml takes the held-out loss of each budget",
            self._command(),
        ]

    def _command(self) -> str:
        least = "" if self.spectrum.min_rank == 1 else f"--min-rank {self.spectrum.min_rank} "
        words = f"{quote(str(self.adapter))} --parameters {self.named.parameters} {least}--out <new folder>"
        return f"to cut to it: llamafactory-adaptive shrink {words}"

    def to_json(self) -> dict[str, Any]:
        """Build the JSON document of the curve."""
        points = [self._point(cut) for cut in self.cuts]
        document = {
            "schema_version": SCHEMA_VERSION,
            "adapter": str(self.adapter),
            "parameters": self.spectrum.parameters,
            "min_rank": self.spectrum.min_rank,
            "named_by": "energy" if self.losses is None else "loss",
            "named": self._point(self.named),
        }
        if (losses := self.losses) is not None:
            for number, point in enumerate(points):
                error = losses.rise_error(number)
                point |= {"loss": losses.mean(losses.cuts_RN[number]), "rise": losses.rise(number),
                          "rise_standard_error": error if math.isfinite(error) else None,
                          "gain_kept": losses.gain_kept(number)}  # fmt: skip
            document |= {"data": losses.data, "rows": len(losses.tokens_N), "tokens": sum(losses.tokens_N),
                         "within": losses.within, "loss_without_adapter": losses.mean(losses.base_N)}  # fmt: skip
        return {**document, "points": points}

    def _point(self, cut: Cut) -> dict[str, Any]:
        return {
            "budget": cut.budget,
            "parameters": cut.parameters,
            "as_rank": self.as_rank(cut),
            "kept_energy": cut.kept_share,
            "kept_energy_by_type": cut.kept_by_type(),
            "ranks": cut.by_name(),
        }

    def save(self, folder: Path) -> None:
        """Write the curve as text, JSON and picture into ``folder``."""
        write_atomically(folder / f"{CURVE_STEM}.txt", self.text() + "\n")
        write_atomically(folder / f"{CURVE_STEM}.json", json.dumps(self.to_json(), indent=1) + "\n")
        save_curve_plot(self, folder / f"{CURVE_STEM}.png")


def save_curve_plot(curve: CutCurve, path: Path) -> None:
    """Plot kept energy, and held-out losses where they were taken, over parameters, with the named cut as a line."""
    figure = new_figure(7.0, 4.0)
    axes = figure.add_subplot()
    sizes = [cut.parameters for cut in curve.cuts]
    axes.plot(sizes, [cut.kept_share for cut in curve.cuts], "o-", color="C0")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("parameters")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=20, fontsize=8)
    axes.minorticks_off()
    axes.set_ylabel("kept energy", color="C0")
    axes.axvline(curve.named.parameters, color="0.4", linestyle=":")
    by = "knee of the energy"
    if (losses := curve.losses) is not None:
        by = f"smallest within {losses.within:.2%} of the loss"
        right = axes.twinx()
        right.plot(sizes, [losses.mean(cut_N) for cut_N in losses.cuts_RN], "s-", color="C1")
        right.axhline(losses.uncut * (1.0 + losses.within), color="C1", linestyle=":", linewidth=1)
        right.set_ylabel("held-out loss", color="C1")
    axes.set_title(
        f"{by}: {curve.named.parameters:,} parameters, as rank {curve.as_rank(curve.named):.1f}", fontsize=10
    )
    save_figure(figure, path)
