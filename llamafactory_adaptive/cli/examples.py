"""``llamafactory-adaptive init``: copy the example YAMLs."""

import argparse
import os
import shutil
import uuid

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.files import cannot_write
from llamafactory_adaptive.paths import shipped_file, shipped_folder


_SKILL = "skills/llamafactory-adaptive/SKILL.md"


def init(arguments: argparse.Namespace) -> int:
    """Copy the examples to ``FOLDER/examples``; their commands are run from FOLDER.

    Raises:
        AdaptiveConfigError: ``FOLDER/examples`` exists already.
        OutputError: not everything can be written there; a partial copy is removed.
    """
    target = arguments.folder / "examples"
    if os.path.lexists(target):  # Path.exists raises where a folder above may not be entered
        refuse("folder", str(target), "it exists already, nothing was overwritten", "another folder")
    # Half a copy of that name would be in the way of the next try.
    unnamed = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copytree(
            shipped_folder("examples"), unnamed, ignore=shutil.ignore_patterns("__pycache__", "*_train.jsonl")
        )
        unnamed.rename(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
    print(f"examples copied to {target}; run the commands of its README.md from {arguments.folder.resolve()}")
    print(f"a skill for coding agents: {shipped_file(_SKILL)}")
    return 0
