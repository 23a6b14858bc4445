"""Files that were damaged on disk: never trained on or exported without a word, never in the way for ever."""

import json
import shutil

import pytest

from tests.faults.scene import METHODS, Command, digests, wait_for


pytestmark = pytest.mark.faults
WEIGHTS = "adapter_model.safetensors"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"one bit flipped in": flip, "half cut off": truncate, "removed": lambda path: path.unlink()}


def pick(folder, index):
    """A file of ``folder``, one after the other."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files[index % len(files)]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("index", range(14))
def test_a_checkpoint(index, kind, scene, tell, tmp_path):
    """Each file of the newest checkpoint in turn: the run goes on from the one before, says so, and ends the same."""
    method = METHODS[index % len(METHODS)]
    reference, _ = scene.reference(method)
    output = tmp_path / "out"
    config = scene.half_trained(method, output)
    path = pick(output / "checkpoint-8", index // len(METHODS) * 3 + index % 3)
    DAMAGES[kind](path)
    said = scene.train(config, tmp_path / "log").finish()
    assert digests(output, WEIGHTS)[WEIGHTS] == digests(reference, WEIGHTS)[WEIGHTS]
    if path.name == "adaptive_digests.json" and kind == "removed":
        outcome = "a checkpoint without digests was checked by its parts and used"
    else:
        # Where the list of digests is itself damaged, it may name another file.
        assert path.name in said or path.name == "adaptive_digests.json", said[-4000:]
        assert "checkpoint-6" in said, said[-4000:]
        outcome = "said so, went on from the checkpoint before, same adapter bit for bit"
    tell("damage", f"{method}: {kind} {path.name} of the newest checkpoint", outcome)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_that_was_asked_for(kind, scene, tell, tmp_path):
    output = tmp_path / "out"
    scene.half_trained("igu", output)
    config = scene.yaml("igu", output, resume_from_checkpoint=str(output / "checkpoint-8"))
    DAMAGES[kind](output / "checkpoint-8" / "optimizer.pt")
    said = scene.train(config, tmp_path / "log").finish(2)
    assert "optimizer.pt" in said
    assert not (output / WEIGHTS).exists()
    tell("damage", f"igu: {kind} optimizer.pt of the checkpoint that was asked for", "refused in one line, exit 2")


@pytest.mark.parametrize("kind", list(DAMAGES)[:2])
@pytest.mark.parametrize("part", ["plans", "statistics"])
def test_the_cache(part, kind, scene, tell, tmp_path):
    cache = tmp_path / "cache"
    environment = {"LLAMAFACTORY_ADAPTIVE_CACHE": str(cache)}
    config = scene.yaml("sensitivity", tmp_path / "unused")

    def plan(name):
        words = ["llamafactory-adaptive", "plan", config, "--out", tmp_path / name]
        said = Command(words, tmp_path / f"{name}.log", environment=environment).finish()
        return said, json.loads((tmp_path / name / "adaptive_rank_plan.json").read_text())["modules"]

    _, expected = plan("before")
    if part == "statistics":  # a plan that lies ready is read first
        shutil.rmtree(cache / "plans")
    [path] = [path for path in (cache / part).iterdir() if path.suffix in (".json", ".safetensors")]
    DAMAGES[kind](path)
    said, modules = plan("after")
    assert modules == expected
    assert path.name in said
    tell("damage", f"{kind} the cached {part}", "said so, computed anew, same ranks")


@pytest.mark.parametrize("kind", list(DAMAGES)[1:])
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_an_adapter_that_is_exported(name, kind, scene, tell, tmp_path):
    adapter = shutil.copytree(scene.adapter, tmp_path / "adapter")
    DAMAGES[kind](adapter / name)
    words = ["llamafactory-adaptive", "export", adapter, "--base", scene.base, "--for", "vllm", "--out",
             tmp_path / "served"]  # fmt: skip
    said = Command(words, tmp_path / "log").finish(2)
    assert name in said
    assert not (tmp_path / "served").exists()
    tell("damage", f"{kind} {name} of an adapter to export", "refused in one line, exit 2, nothing written")


def test_a_stale_lock_of_the_output_folder(scene, tell, tmp_path):
    output = tmp_path / "out"
    config = scene.yaml("igu", output)
    first = scene.train(config, tmp_path / "log")
    wait_for((output / "_adaptive_lock").exists, first)
    first.kill()
    scene.train(config, tmp_path / "log").finish()
    tell("locks", "igu: killed while it held its output folder", "the next run took the folder over at once")
