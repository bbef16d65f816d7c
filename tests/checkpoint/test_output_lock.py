# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One process at a time makes a directory, and a dead one is in nobody's way."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ptq.checkpoint import output_lock
from nemo_ptq.checkpoint.output_lock import held, lock_path, owner_of
from nemo_ptq.errors import PtqError

HOLDER = """
import sys, time
from pathlib import Path
from nemo_ptq.checkpoint.output_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which makes ``out``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_hears_of_the_first(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    output = tmp_path / "out"
    owner = owner_of(output)
    assert owner is not None
    assert owner.startswith(f"process {holder.pid} on {socket.gethostname()} since 2")
    with pytest.raises(PtqError) as refused, held(output):
        pass
    assert str(refused.value) == (
        f"{output} is being written by {owner}: wait until it has ended, or choose another directory"
    )


def test_the_lock_of_a_dead_process_is_none(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    output = tmp_path / "out"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_path(output).exists()
    assert owner_of(output) is None
    with held(output) as works:
        assert works
        owner = owner_of(output)
        assert owner is not None
        assert owner.startswith(f"process {os.getpid()} ")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_gone_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt), held(output):
        assert [path.name for path in output.parent.iterdir()] == [".out.lock"]
        raise KeyboardInterrupt
    assert list(output.parent.iterdir()) == []


def test_a_file_that_its_owner_has_just_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, flock = tmp_path / "out", fcntl.flock

    def too_late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(output_lock.fcntl, "flock", flock)
        lock_path(output).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(output_lock.fcntl, "flock", too_late)
    with held(output):
        assert owner_of(output) is not None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output_lock.fcntl, "flock", refuse)
    with held(tmp_path / "out") as works:
        assert not works
        assert owner_of(tmp_path / "out") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "here"}'])
def test_an_owner_that_has_not_written_its_name_yet(content: str, tmp_path: Path) -> None:
    with lock_path(tmp_path / "out").open("w") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert owner_of(tmp_path / "out") == "another process"


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PtqError, match=r"file/\.out\.lock cannot be written \("), held(tmp_path / "file" / "out"):
        pass


def test_a_lock_that_cannot_be_signed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(PtqError, match=r"out\.lock cannot be written \(Input/output error\)"), held(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
