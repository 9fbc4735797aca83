"""A file is written completely or not at all, whatever happens in between and whoever else writes it."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from pyro_genmodels.cli import app
from pyro_genmodels.utils import files
from pyro_genmodels.utils.errors import ArgumentError
from pyro_genmodels.utils.files import MAX_BYTES, atomic_write, check_size


def pandas():
    import pandas as pd

    return pd.DataFrame({"a": [1.0]})


def netcdf(path):
    import xarray as xr

    xr.Dataset({"a": ("x", [1.0])}).to_netcdf(path, engine="h5netcdf")


WRITERS = {
    "a.txt": lambda path: path.write_text("new"),
    "a": lambda path: path.write_text("new"),
    ".hidden": lambda path: path.write_text("new"),
    "a.npz": lambda path: np.savez(path, x=np.ones(3)),
    "a.png": lambda path: Figure().savefig(path),
    "a.csv": lambda path: pandas().to_csv(path),
    "a.safetensors": lambda path: save_file({"a": torch.ones(3)}, path),
    "a.nc": netcdf,
    "a b.v1.tar.gz": lambda path: path.write_bytes(b"new"),
    "e" * 251 + ".txt": lambda path: path.write_text("new"),
}


@pytest.mark.parametrize("name", WRITERS, ids=lambda name: name[-20:])
def test_any_writer_works_and_leaves_only_the_file(name, tmp_path):
    path = tmp_path / "made" / "now" / name
    with atomic_write(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
        assert not path.exists()
        WRITERS[name](temporary)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_size > 0


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("name", ["a.txt", "a.safetensors"])
def test_the_file_has_the_permissions_of_any_new_file(name, umask, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / name) as temporary:
            WRITERS[name](temporary)
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_the_old_file(error, old, tmp_path):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(type(error)), atomic_write(path) as temporary:  # noqa: PT012 (the block fails)
        temporary.write_text("half of it")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old and longer")
    with atomic_write(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old and longer"
    assert path.read_text() == "new"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("there", "dangling"):
        (tmp_path / name).symlink_to(tmp_path / "far" / f"{name}.txt")
    (tmp_path / "far" / "there.txt").write_text("old")
    for name in ("there", "dangling"):
        with atomic_write(tmp_path / name) as temporary:
            assert temporary.suffix == ""
            temporary.write_text("new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "far" / f"{name}.txt").read_text() == "new"


def test_nothing_written_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"a\.txt'$"), atomic_write(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_and_devices_are_refused_before_the_block_runs(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, "/dev/null", tmp_path / "pipe", tmp_path / "file" / "a.txt"):
        with pytest.raises(OSError, match=r"folder or a device|file"), atomic_write(path):
            pytest.fail("the block has run")
    assert Path("/dev/null").is_char_device()


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'$"), atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=r"/a\.txt'$"), atomic_write(path) as temporary:
        temporary.read_text()
    with pytest.raises(FileNotFoundError, match=r"other'$"), atomic_write(path):
        (tmp_path / "other").read_text()


def run(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"old")
    code = """
        import resource, sys
        import numpy as np
        from pyro_genmodels.utils.files import atomic_write
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with atomic_write(sys.argv[1]) as temporary:
                np.save(temporary, np.zeros(100_000))
        except OSError as error:
            print(error)
    """
    out, err = run(code, path).communicate(timeout=600)
    assert (out != "", err) == (True, "")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def make_old(path):
    """Set the time of a file to a little more than a day ago."""
    then = time.time() - 86_500
    os.utime(path, (then, then))


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = """
        import sys, time
        from pyro_genmodels.utils.files import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text("half")
            print("written", flush=True)
            time.sleep(600)
    """
    process = run(code, path)
    assert process.stdout.readline() == "written\n"
    other = tmp_path / "b.txt"
    [temporary] = (p for p in tmp_path.iterdir() if p.name.startswith("."))
    for target in (path, other):  # the process lives, and then it is another file's
        with atomic_write(target) as mine:
            mine.write_text("old")
    assert temporary.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert path.read_text() == "old"
    with atomic_write(other) as mine:
        mine.write_text("new")
    assert temporary.exists()
    with atomic_write(path) as mine:
        mine.write_text("new")
    assert temporary.exists()  # it may be of a process that is not seen from here
    make_old(temporary)
    with atomic_write(path) as mine:
        mine.write_text("new")
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_leftover_of_an_earlier_process_with_the_same_number_is_removed(tmp_path):
    """In a container, where the main process has the number 1 each time."""
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        with atomic_write(path) as another:  # as another thread would
            another.write_text("newer")
        assert temporary.exists()
        earlier = temporary.with_name(temporary.name.replace(files._PROCESS, "0" * 8))
        foreign = [
            tmp_path / f".{'0' * 16}.txt",
            tmp_path / ".a.txt",
            temporary.with_name(temporary.name[:13] + "-x-1-0-0.txt"),
        ]
        for file in (earlier, *foreign):
            file.touch()
            make_old(file)
        make_old(temporary)
        with atomic_write(path) as another:  # a file of this process is no leftover, however old it is
            another.write_text("newer")
        assert temporary.exists()
        assert not earlier.exists()
        young = earlier.with_name(earlier.name.replace("0" * 8, "1" * 8))
        young.touch()
    assert path.read_text() == "new"
    with atomic_write(path) as temporary:
        temporary.write_text("newest")
    assert sorted(tmp_path.iterdir()) == sorted([path, young, *foreign])


def test_what_is_too_large_names_the_limit():
    check_size("it", 10, 10)
    with pytest.raises(
        ArgumentError, match=r"it takes 11 bytes, but at most 10 are read\. If you trust it, raise max_bytes\."
    ) as caught:
        check_size("it", 11, 10)
    assert (caught.value.argument, caught.value.example) == ("max_bytes", "11")


def test_several_processes_write_at_once_and_readers_see_only_complete_files(tmp_path):
    path, size = tmp_path / "a.txt", 200_000
    code = """
        import sys
        from pyro_genmodels.utils.files import atomic_write
        for _ in range(30):
            with atomic_write(sys.argv[1]) as temporary:
                temporary.write_text(sys.argv[2] * int(sys.argv[3]))
    """
    processes = [run(code, path, letter, size) for letter in "abc"]
    running = True
    while running:  # the last look is after all of them have ended
        running = any(process.poll() is None for process in processes)
        if path.exists():
            text = path.read_text()
            assert text == text[0] * size
    assert [process.communicate()[1] for process in processes] == [""] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_python_and_the_command_line_read_files_of_the_same_size():
    assert app.MAX_SIZE * 1e9 == MAX_BYTES == 10**9
