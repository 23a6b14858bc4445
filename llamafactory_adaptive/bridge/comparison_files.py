"""What the files of a comparison hold, by which its ledger knows runs: base model, plans, calibration rows.

A run whose settings name the same files with other contents is another run.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.fingerprint import data_digest, model_digest
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.files import digest_of, file_digest, read_mapping, write_atomically


MODEL_FILE = "model.json"  # in the folder of a comparison
_PLAN, _ROWS = "adaptive_plan", "adaptive_calibration_dataset"


def known_model(folder: Path, given: Args, seen: Any, say: Callable[[str], None]) -> str:
    """Return the digest of what the model's files hold, which are read once while sizes and times stay the same.

    Args:
        folder: folder of the comparison, where the digest is kept.
        given: settings that name the model.
        seen: what tells that the files are those of before: names, sizes, times and digests of small ones.
        say: tells the user what takes long.
    """
    path, now = folder / MODEL_FILE, digest_of(seen)
    held = read_mapping(path, str(path), "; delete it: it is made anew") if path.is_file() else {}
    if now not in held:
        if isinstance(seen, dict):  # files of a folder, and no name on a hub
            say("reading the model's files, by which the ledger knows it: about a second a gigabyte")
        held = {now: model_digest(given)}
        write_atomically(path, json.dumps(held) + "\n")
    return str(held[now])


def named_files(settings: Args) -> dict[str, str]:
    """Compute digests of what the settings of a run name beside model and training rows: a plan, calibration rows.

    Nothing is in it where they name none.

    Raises:
        AdaptiveConfigError: the plan cannot be read.
    """
    found = {}
    if plan := settings.get(_PLAN):
        try:
            found[_PLAN] = file_digest(Path(plan))
        except OSError as error:
            refuse(_PLAN, plan, f"it cannot be read ({error.strerror})", "the plan that was there", cause=error)
    if settings.get(_ROWS):
        found[_ROWS] = data_digest(settings)
    return found


def check_unchanged(arm: str, before: Mapping[str, str], settings: Args) -> None:
    """Check that the files that an arm's settings name are those that the comparison began with.

    Raises:
        AdaptiveConfigError: one was changed, so that runs of one arm would be of two kinds.
    """
    for key, digest in named_files(settings).items():
        if digest != before[key]:
            reason = f"what it names was changed while the comparison ran (arm {arm})"
            refuse(key, settings[key], reason, "the same command again, which makes the arm's runs anew")
