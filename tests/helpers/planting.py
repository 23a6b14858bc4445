"""Faults in single modules, planted in the files of an export that is right otherwise."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


def read(folder: Path) -> Tensors:
    """All tensors of a folder, from however many files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a folder in one go; each goes back into the file it came from, new ones into the last."""
    places = {name: path for path in sorted(folder.glob("*.safetensors")) for name in load_file(path)}
    tensors, last = read(folder), max(places.values())
    change(tensors)
    for path in set(places.values()):
        mine = {name: t.contiguous() for name, t in tensors.items() if places.get(name, last) == path}
        save_file(mine, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class InLayout:
    """Faults of LoRA layouts: in the factors of ``module``."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder
        self.a, self.b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")

    def _change(self, change: Callable[[Tensors], object]) -> None:
        rewrite(self.folder, change)

    def one_per_cent(self) -> None:
        """Make the update 1 % too strong."""
        self._change(lambda t: t.update({self.b: t[self.b] * 1.01}))

    def negated(self) -> None:
        """Turn the sign of the update."""
        self._change(lambda t: t.update({self.b: -t[self.b]}))

    def dropped(self) -> None:
        """Leave the module out."""
        self._change(lambda t: (t.pop(self.a), t.pop(self.b)))

    def half_dropped(self) -> None:
        """Leave one factor out."""
        self._change(lambda t: t.pop(self.b))

    def transposed(self) -> None:
        """Take the update of a square layer the other way round."""
        self._change(lambda t: t.update({self.a: t[self.b].T, self.b: t[self.a].T}))

    def swapped(self, other: str) -> None:
        """Exchange two modules of the same sizes."""
        theirs = InLayout(self.folder, other)
        keys = {self.a: theirs.a, self.b: theirs.b, theirs.a: self.a, theirs.b: self.b}
        self._change(lambda t: t.update({key: t[source] for key, source in keys.items()}))

    def added(self, like: str) -> None:
        """Give the module, which the adapter has not, the factors of ``like``."""
        theirs, path = InLayout(self.folder, like), self.folder / "adapter_config.json"
        self._change(lambda t: t.update({self.a: t[theirs.a].clone(), self.b: t[theirs.b].clone()}))
        config, names = json.loads(path.read_text()), [k.removeprefix(PREFIX).split(".lora_")[0] for k in (self.a,)]
        edit_json(path, target_modules=[*config["target_modules"], *names])


class InMerged:
    """The same faults in the weights of a merged model, whose base is given."""

    def __init__(self, folder: Path, base: Path, module: str) -> None:
        self.folder, self.base, self.key = folder, read(base), f"{module}.weight"

    def _set(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        def change(tensors: Tensors) -> None:
            base = self.base[self.key].to(tensors[self.key].dtype)
            tensors[self.key] = make(base, tensors[self.key] - base)

        rewrite(self.folder, change)

    def one_per_cent(self) -> None:
        """Make the update 1 % too strong."""
        self._set(lambda base, update: base + 1.01 * update)

    def negated(self) -> None:
        """Turn the sign of the update."""
        self._set(lambda base, update: base - update)

    def dropped(self) -> None:
        """Leave the update out."""
        self._set(lambda base, update: base)

    def half_dropped(self) -> None:
        """Leave the weight itself out."""
        rewrite(self.folder, lambda t: t.pop(self.key))

    def transposed(self) -> None:
        """Take the update of a square layer the other way round."""
        self._set(lambda base, update: base + update.T)

    def swapped(self, other: str) -> None:
        """Exchange the updates of two modules of the same sizes."""
        key = f"{other}.weight"
        rewrite(self.folder, lambda t: t.update({
            self.key: self.base[self.key] + t[key] - self.base[key],
            key: self.base[key] + t[self.key] - self.base[self.key],
        }))  # fmt: skip

    def added(self, like: str) -> None:
        """Change a weight that the adapter leaves alone, in its last place."""
        self._set(lambda base, update: torch.nextafter(base, base + 1))


def planter(server: str, folder: Path, base: Path, module: str) -> InLayout | InMerged:
    """What plants faults in an export for ``server``."""
    return InMerged(folder, base, module) if server == "merged" else InLayout(folder, module)
