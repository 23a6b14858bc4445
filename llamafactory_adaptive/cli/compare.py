"""``llamafactory-adaptive compare``: does it pay, on the user's own data."""

import argparse
import sys

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.reports.plaintext import tell


def compare(arguments: argparse.Namespace) -> int:
    """Run all arms at their own best learning rates, and write what came of it; return 1 if an arm could not run."""
    require_enabled()
    tell(f"comparing ways to train {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    from llamafactory_adaptive.bridge.comparison_request import comparison_of, fixed_before
    from llamafactory_adaptive.bridge.host_check import check_folder
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.comparison.pages import sentences, text_table, write_pages
    from llamafactory_adaptive.comparison.request import effect_of
    from llamafactory_adaptive.comparison.secrets import redacted
    from llamafactory_adaptive.comparison.starts import changes, note_start
    from llamafactory_adaptive.folder_lock import locked

    require_seams()
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    effect = effect_of(arguments.effect)
    check_folder("--out", arguments.out)
    comparison, devices = comparison_of(arguments, tell)
    if arguments.dry_run:
        return 0
    with locked(arguments.out):
        starts = note_start(arguments.out, fixed_before(arguments, comparison))
        progress = comparison.run(devices, tell)
        command = redacted(["llamafactory-adaptive", *arguments.words])
        document = comparison.document(progress, effect, command, changes(starts))
        files = write_pages(document, arguments.out)
    print("\n".join([*text_table(document), "", *sentences(document), "", *(f"written: {path}" for path in files)]))
    return 1 if any("failed" in arm for arm in document["arms"]) else 0
