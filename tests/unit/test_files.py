"""Whole writes, checked reads, digests and locks."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import AdaptiveError, OutputError, PlanError
from llamafactory_adaptive.files import write_atomically
from llamafactory_adaptive.folder_lock import locked


HOSTILE = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep but parsed": "[" * 200 + "]" * 200,
    "no number": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "out of range": '{"a": 1e999}',
    "many digits": '{"a": ' + "9" * 10_000 + "}",
    "cut off": '{"a": [1, 2',
    "empty": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_one_error_of_the_callers_kind(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="the plan"):
        files.read_json(path, "the plan")


def test_bytes_that_are_no_text_and_things_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(PlanError, match="not valid JSON"):
        files.read_json(tmp_path / "x.json", "x")
    os.mkfifo(tmp_path / "pipe")  # reading one would wait for ever
    with pytest.raises(PlanError, match="no regular file"):
        files.read_json(tmp_path / "pipe", "x")
    with pytest.raises(OutputError, match="no regular file"):
        files.read_json(tmp_path, "x", error=OutputError)
    with pytest.raises(PlanError, match=r"cannot read x: No such file.* try this"):
        files.read_json(tmp_path / "none", "x", " try this")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(files._MOST_BYTES + 1)
    with pytest.raises(PlanError, match="bytes; at most"):
        files.read_json(tmp_path / "x.json", "x")


def test_histories_may_hold_what_is_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"loss": NaN}')
    assert files.read_mapping(tmp_path / "x.json", "x", finite=False)["loss"] != 0
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(PlanError, match="no JSON mapping but a list"):
        files.read_mapping(tmp_path / "x.json", "x")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(OutputError, match=r"x cannot be written \(No space left on device\)"), files.replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["x"]


def test_writability_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    assert files.check_writable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    assert "long" in files.check_writable(tmp_path / ("x" * 300) / "b")
    (tmp_path / "file").write_text("x")
    assert files.check_writable(tmp_path / "file" / "b")
    assert files.check_writable(tmp_path / "file")
    assert files.check_writable(Path("/proc/none"))


def test_runs_that_begin_together_do_not_meet_in_a_folder_that_is_new(tmp_path: Path) -> None:
    """Neither makes nor removes the parent they share, whatever the other does at that moment."""
    shared, made = tmp_path / "sweep", []
    for number in range(200):
        other = threading.Thread(target=lambda n=number: (shared / f"run{n}").mkdir(parents=True, exist_ok=True))
        other.start()
        made.append(files.check_writable(shared / f"mine{number}"))
        other.join(30)
        shutil.rmtree(shared)
    assert made == [None] * 200


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(1000))
    assert files.damaged_files(tmp_path) == []  # nobody noted anything yet
    files.write_digests(tmp_path)
    (tmp_path / "later").write_text("x")
    assert files.damaged_files(tmp_path) == []
    content = bytearray((tmp_path / "a").read_bytes())
    content[500] ^= 1
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:999])
    (tmp_path / "sub/c").unlink()
    assert files.damaged_files(tmp_path) == [
        "a has changed since it was written", "b has changed since it was written", "sub/c is missing",
    ]  # fmt: skip
    (tmp_path / files.DIGESTS_FILE).write_text(json.dumps({"sha256": 3}))
    with pytest.raises(PlanError, match="holds no digests"):
        files.damaged_files(tmp_path)


def _holder(folder: Path) -> "subprocess.Popen[bytes]":
    code = (
        "import sys, time; from pathlib import Path; from llamafactory_adaptive.folder_lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_is_held_by_one_process_until_that_is_killed(tmp_path: Path) -> None:
    other = _holder(tmp_path / "out")
    try:
        with (
            pytest.raises(OutputError, match=rf"another run works in .*out \(process {other.pid} on "),
            locked(tmp_path / "out", seconds=0),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path / "out", seconds=10):
        assert f"process {os.getpid()}" in (tmp_path / "out" / files.LOCK_FILE).read_text()


def test_every_error_of_this_room_is_one_a_user_can_act_on() -> None:
    assert issubclass(OutputError, AdaptiveError)


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_line_is_dropped_on_read_and_by_the_next_append(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, '{"step": 1}')
    with log.open("a") as file:
        file.write('{"step": 2, "ra')
    assert files.read_lines(log) == ['{"step": 1}']
    files.append_line(log, '{"step": 3}')
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_damaged_cache_entry_is_told_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = tmp_path / "entry.json"
    assert not files.usable_entry(entry)
    entry.write_text("content")
    files.note_checksum(entry)
    assert files.usable_entry(entry)
    entry.write_text("Content")
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        assert not files.usable_entry(entry)
    assert "entry.json in the cache is damaged" in caplog.text
    assert not entry.exists()
    assert (tmp_path / "entry.json.damaged").read_text() == "Content"
    entry.write_text("without a checksum")
    assert not files.usable_entry(entry)
