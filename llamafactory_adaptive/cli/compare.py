"""``llamafactory-adaptive compare``: does it pay, on the user's own data."""

import argparse
import sys

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.reports.plaintext import tell


def compare(arguments: argparse.Namespace) -> int:
    """Run all arms at their own best learning rates, and write what came of it; return 1 if an arm could not run."""
    require_enabled()
    tell(f"comparing ways to train {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    from llamafactory_adaptive.bridge.comparison_request import comparison_of, evaluations_of, fixed_before
    from llamafactory_adaptive.bridge.host_check import check_folder
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.comparison.pages import sentences, text_table, write_pages
    from llamafactory_adaptive.comparison.request import effect_of
    from llamafactory_adaptive.comparison.secrets import redacted
    from llamafactory_adaptive.comparison.starts import changes, note_start
    from llamafactory_adaptive.comparison.task_pages import task_text
    from llamafactory_adaptive.comparison.task_request import task_request_of
    from llamafactory_adaptive.folder_lock import locked

    require_seams()
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    effect, request = effect_of(arguments.effect), task_request_of(arguments)
    check_folder("--out", arguments.out)
    comparison, devices = comparison_of(arguments, tell)
    evaluations = evaluations_of(comparison, request, devices, tell)
    if arguments.dry_run:
        return 0
    with locked(arguments.out):
        starts = note_start(arguments.out, fixed_before(arguments, comparison, effect, request))
        progress = comparison.run(devices, tell, None if evaluations is None else evaluations.has_to_answer)
        command = redacted(["llamafactory-adaptive", *arguments.words])
        document = comparison.document(progress, effect, command, changes(starts))
        if evaluations is not None and (tasks := evaluations.document(progress))["arms"]:
            document["tasks"] = tasks  # what was answered before this start
        files = write_pages(document, arguments.out)
        if evaluations is not None:
            document["tasks"] = evaluations.run(progress, devices)
            files = write_pages(document, arguments.out)
    said = [*text_table(document), "", *sentences(document), *task_text(document)]
    print("\n".join([*said, "", *(f"written: {path}" for path in files)]))
    judged = [*document["arms"], *document.get("tasks", {}).get("arms", ())]
    return 1 if any("failed" in arm for arm in judged) else 0
