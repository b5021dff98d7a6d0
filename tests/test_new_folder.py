"""A folder is there whole or not at all: free places, exceptions, signals, other processes, rests of killed ones."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from lit_peft.saving.new_folder import check_free, new_folder


def write(out: Path) -> None:
    with new_folder(out) as part:
        (part / "inside").mkdir()
        (part / "inside" / "file").write_text("content")
        assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a link to an empty folder", "nothing above it"])
def test_it_appears_whole(there, tmp_path):
    out = tmp_path / "out"
    if there == "an empty folder":
        out.mkdir()
    elif there == "a link to an empty folder":
        (tmp_path / "real").mkdir()
        out.symlink_to(tmp_path / "real")
    elif there == "nothing above it":
        out = tmp_path / "a" / "b" / "out"
    write(out)
    assert (out / "inside" / "file").read_text() == "content"
    assert not list(tmp_path.rglob(".*"))


def test_a_place_that_is_taken_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "exists and is not empty; name another folder"),
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file" / "out", "cannot be a folder: .*file is a file"),
        (Path("/proc"), "is a mount point; name a new folder in it, /proc/model"),
    ):
        with pytest.raises(OSError, match=message):
            check_free(out)
        with pytest.raises(OSError, match=message):
            write(out)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        check_free(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    """Renamed away, it would be gone under the shell that is in it."""
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path):
        with pytest.raises(FileExistsError, match="is the folder you are in; name a new folder in it"):
            check_free(out)


def test_where_no_file_can_be_nobody_is_said_to_write():
    with pytest.raises(PermissionError, match="/proc/x cannot be made"):
        write(Path("/proc/x"))


def test_a_name_may_be_as_long_as_names_may_be(tmp_path):
    write(tmp_path / ("n" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def no_lock(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_lock)
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("wrong")])
def test_an_exception_leaves_nothing(error, tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(type(error)), new_folder(out) as part:
        (part / "half").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_place_that_was_taken_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="is not empty"), new_folder(out):
        out.mkdir()
        (out / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path):
    rest, lock = tmp_path / ".out.part", tmp_path / ".out.lock"
    rest.mkdir()
    (rest / "half").touch()
    with FileLock(lock), pytest.raises(FileExistsError, match="another process is writing this folder"):
        write(tmp_path / "out")
    assert (rest / "half").exists()
    lock.touch()
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_thread_may_write(tmp_path):
    thread = threading.Thread(target=write, args=[tmp_path / "out"])
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "inside").is_dir()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_never_leaves_half_of_it(number, status, tmp_path):
    code = (
        "import sys, time; from lit_peft.saving.new_folder import new_folder\n"
        "with new_folder(sys.argv[1]) as part:\n"
        "    (part / 'half').touch(); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait() == status
    assert {path.name for path in tmp_path.iterdir()} <= ({".out.part", ".out.lock"} if status == -9 else set())
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
