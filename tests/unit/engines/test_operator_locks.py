"""Locks of torch's extension builder, of living and of dead builds."""

import os
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from llamafactory_adaptive.engines.operator_locks import bounded_waits
from llamafactory_adaptive.errors import OutputError


def lock_of(folder, age):
    """A lock in whose folder nothing was written for ``age`` seconds."""
    folder.mkdir()
    path, then = folder / "lock", time.time() - age
    path.write_text("")
    os.utime(path, (then, then))
    return path


def test_the_lock_of_a_dead_build_goes_with_a_word(tmp_path, caplog):
    path = lock_of(tmp_path / "operator", age=1000)
    with bounded_waits(quiet=900):
        baton = FileBaton(str(path))
        assert baton.try_acquire()
        baton.release()
    assert "was left by a build that was broken off (1000 s without a trace)" in caplog.text


def test_a_living_build_is_waited_for(tmp_path):
    path = lock_of(tmp_path / "operator", age=0)
    with bounded_waits(quiet=900):
        baton = FileBaton(str(path))
        assert not baton.try_acquire()
        end = threading.Timer(0.3, path.unlink)
        end.start()
        baton.wait()
    assert not path.exists()


def test_a_build_that_dies_while_it_is_waited_for_is_an_error_that_names_the_lock(tmp_path):
    path = lock_of(tmp_path / "operator", age=0)
    with bounded_waits(quiet=0.5), pytest.raises(OutputError, match=rf"delete {path} and run again"):
        FileBaton(str(path)).wait()


def test_a_build_that_writes_is_alive_however_old_its_lock(tmp_path):
    path = lock_of(tmp_path / "operator", age=1000)
    (path.parent / "kernel.o").write_text("")
    with bounded_waits(quiet=900):
        assert not FileBaton(str(path)).try_acquire()
    assert path.exists()


def test_pytorch_has_its_own_ways_back_afterwards():
    before = FileBaton.try_acquire, FileBaton.wait
    with bounded_waits():
        assert FileBaton.wait is not before[1]
    assert (FileBaton.try_acquire, FileBaton.wait) == before
