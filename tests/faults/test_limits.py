"""Full disks, folders that cannot be written, proxies, and two runs at once."""

import shutil
import subprocess

import pytest

from llamafactory_adaptive.files import read_json
from tests.faults.scene import Command, digests, wait_for


pytestmark = pytest.mark.faults
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def small_disk(tmp_path):
    """A file system that is soon full: a tmpfs of half a megabyte where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_while_training(scene, small_disk, tell, tmp_path):
    """Checkpoints of a tiny model take some hundred kilobytes: the second or third finds no room."""
    output = small_disk / "out"
    config = scene.yaml("igu", tmp_path / "unused", output_dir=str(output))
    command = scene.train(config, tmp_path / "log")
    assert "No space left" in command.finish(2)
    complete = [path for path in output.glob("checkpoint-*") if (path / "adaptive_digests.json").is_file()]
    moved = tmp_path / "moved"
    shutil.copytree(output, moved, ignore=shutil.ignore_patterns("_adaptive_lock"))
    scene.train(scene.yaml("igu", moved), tmp_path / "log").finish()
    reference, _ = scene.reference("igu")
    assert digests(moved, WEIGHTS)[WEIGHTS] == digests(reference, WEIGHTS)[WEIGHTS]
    outcome = f"it said so; on a larger disk it went on from {len(complete)} whole checkpoints, same adapter"
    tell("full disk", "igu: the disk filled up while checkpoints were written", outcome)


@pytest.mark.parametrize("size", [3000, 8000])
def test_a_limit_on_files_while_planning(size, scene, tell, tmp_path):
    """The statistics and the plan of this model are larger, its printed table is not; its rows are read before."""
    scene.reference("sensitivity")
    config = scene.yaml("sensitivity", tmp_path / "unused")
    environment = {"LLAMAFACTORY_ADAPTIVE_CACHE": str(tmp_path / "cache")}
    words = ["llamafactory-adaptive", "plan", config, "--out", tmp_path / "planned"]
    command = Command(words, tmp_path / "log", environment=environment, file_limit=size)
    command.finish(2)
    said = command.said()
    assert "cannot be written (" in said or "nothing can be written there (" in said
    assert "File too large" in said
    for path in (tmp_path / "planned").glob("*"):
        assert path.name == "adaptive_rank_plan.json", "half a picture"
        assert read_json(path, "the plan")["modules"], "half a plan"
    tell("full disk", f"sensitivity: plan with files of at most {size} bytes", "one line, exit 2, nothing half")


def test_a_full_cache_does_not_lose_the_scores(scene, small_disk, tell, tmp_path):
    (small_disk / "filling").write_bytes(b"\0" * 500 * 1024)
    config = scene.yaml("sensitivity", tmp_path / "unused")
    words = ["llamafactory-adaptive", "plan", config, "--out", tmp_path / "planned"]
    command = Command(words, tmp_path / "log", environment={"LLAMAFACTORY_ADAPTIVE_CACHE": str(small_disk / "cache")})
    said = command.finish()
    assert "Traceback" not in said
    assert "not kept for later runs" in said
    assert (tmp_path / "planned" / "adaptive_rank_plan.json").is_file()
    tell("full disk", "sensitivity: the cache's disk is full", "said so, planned all the same")


@pytest.mark.parametrize("server", ["vllm", "merged"])
def test_a_disk_too_small_for_an_export(server, scene, small_disk, tell, tmp_path):
    (small_disk / "filling").write_bytes(b"\0" * 480 * 1024)
    words = ["llamafactory-adaptive", "export", scene.adapter, "--base", scene.base, "--for", server, "--out",
             small_disk / "served"]  # fmt: skip
    Command(words, tmp_path / "log").finish(2)
    assert [path.name for path in small_disk.iterdir()] == ["filling"]
    tell("full disk", f"{server}: no room for the export", "one line, exit 2, nothing left behind")


@pytest.mark.parametrize("command", ["train", "plan", "export"])
def test_an_output_folder_that_cannot_be_written(command, scene, tell, tmp_path):
    (tmp_path / "file").write_text("this is no folder")
    folder = tmp_path / "file" / "out"
    config = scene.yaml("sensitivity", tmp_path / "unused", output_dir=str(folder))
    words = {
        "train": ["llamafactory-cli", "train", config],
        "plan": ["llamafactory-adaptive", "plan", config],
        "export": ["llamafactory-adaptive", "export", scene.adapter, "--base", scene.base, "--for", "peft", "--out",
                   folder],
    }[command]  # fmt: skip
    said = Command(words, tmp_path / "log").finish(2)
    assert "file" in said
    tell("full disk", f"{command}: a file stands where the output folder should be", "one line, exit 2")


def test_a_proxy_that_leads_nowhere(scene, tell, tmp_path):
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    output = tmp_path / "out"
    scene.train(scene.yaml("igu", output), tmp_path / "log", environment=proxies).finish()
    reference, _ = scene.reference("igu")
    assert digests(output, WEIGHTS)[WEIGHTS] == digests(reference, WEIGHTS)[WEIGHTS]
    tell("proxies", "igu: proxies set that answer nothing", "the run needs none: same adapter")


def test_two_trainings_in_one_folder(scene, tell, tmp_path):
    """The first goes on from checkpoints, so that there is much in the folder that has to stay."""
    output, log = tmp_path / "out", tmp_path / "out" / "adaptive_log.jsonl"
    scene.half_trained("sensitivity", output)
    older = log.read_bytes()
    # Long enough that it still runs when the second has waited its seconds for the lock.
    config = scene.yaml("sensitivity", output, max_steps=20_000, save_strategy="no")
    first = scene.train(config, tmp_path / "first.log")
    try:
        # Its line is written when plan and picture are.
        wait_for(lambda: log.stat().st_size > len(older) and log.read_bytes().endswith(b"\n"), first)
        written, before = log.read_bytes(), digests(output)
        second = scene.train(config, tmp_path / "second.log").finish(2)
        after = digests(output)
    finally:
        undisturbed = first.kill()
    assert f"another run works in {output} (process {first.process.pid} on " in second
    assert undisturbed, first.said()[-4000:]
    assert {
        "_adaptive_lock",
        "adaptive_rank_plan.json",
        "adaptive_ranks.png",
        f"checkpoint-8/{WEIGHTS}",
    } < before.keys()
    assert log.read_bytes().startswith(written), "lines are only added"
    growing = {log.name, "trainer_log.jsonl"}  # by the first one
    kept, remaining = ({name: of[name] for name in of.keys() - growing} for of in (before, after))
    assert remaining == kept
    tell("two at once", "sensitivity: a second training in the same folder", "refused in one line, no file changed")


def test_two_plans_of_one_request(scene, tell, tmp_path):
    environment = {"LLAMAFACTORY_ADAPTIVE_CACHE": str(tmp_path / "cache")}
    config = scene.yaml("sensitivity", tmp_path / "unused")
    both = [
        Command(["llamafactory-adaptive", "plan", config, "--out", tmp_path / name], tmp_path / f"{name}.log",
                environment=environment)
        for name in ("one", "two")
    ]  # fmt: skip
    for command in both:
        command.finish()
    one, two = (digests(tmp_path / name, "adaptive_rank_plan.json") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(list((tmp_path / "cache" / "plans").glob("*.json"))) == 1
    tell("two at once", "sensitivity: the same plan asked for twice", "both exit 0, one plan in the cache")


def test_two_exports_of_one_name(scene, tell, tmp_path):
    words = ["llamafactory-adaptive", "export", scene.adapter, "--base", scene.base, "--for", "merged", "--out",
             tmp_path / "served"]  # fmt: skip
    both = [Command(words, tmp_path / f"{name}.log") for name in ("one", "two")]
    codes = sorted(command.wait() for command in both)
    assert codes in ([0, 2], [0, 0])
    assert all("Traceback" not in command.said() for command in both)
    assert (tmp_path / "served" / "parity_certificate.json").is_file()
    assert not list(tmp_path.glob(".served.*"))
    tell("two at once", "merged: the same export twice", f"exit {codes[0]} and {codes[1]}, one whole folder")
