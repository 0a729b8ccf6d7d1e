"""The NVMe store's directory: one process at a time has it, and one that cannot hold a store is named."""

import subprocess
import sys
import textwrap

import pytest

from tests.nvme_kit import config, taken
from wicore_backend.hmt.nvme import (
    NvmeStore,
    StoreInUseError,
    StoreUnusableError,
)
from wicore_backend.hmt.nvme.files import PAGE


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        from tests.nvme_kit import config
        from wicore_backend.hmt.nvme import NvmeStore
        store = NvmeStore(config(Path(sys.argv[1])))
        print("open", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreInUseError, match=rf"{tmp_path} is in use by another process \(pid {other.pid}\)"):
            NvmeStore(config(tmp_path))
        other.kill()
        other.wait()
    NvmeStore(config(tmp_path)).close()


def test_two_stores_of_one_process_are_kept_apart_too(tmp_path):
    with NvmeStore(config(tmp_path)):
        with pytest.raises(StoreInUseError):
            NvmeStore(config(tmp_path))
        (tmp_path / "lock").unlink()
        with pytest.raises(StoreInUseError, match=f"{tmp_path} is in use"):
            NvmeStore(config(tmp_path))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusableError, match=rf"{tmp_path}/file/store cannot hold .* can write"):
        NvmeStore(config(tmp_path / "file" / "store"))


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    store = tmp_path / "store"
    store.mkdir()
    (store / "slots").symlink_to(victim)
    with pytest.raises(StoreUnusableError, match="cannot hold"):
        NvmeStore(config(store))
    assert victim.read_text() == "mine"


def test_more_than_the_disk_has_is_refused_at_the_start_and_takes_nothing(tmp_path):
    with pytest.raises(StoreUnusableError, match="lower its capacity or free space"):
        NvmeStore(config(tmp_path, capacity_bytes=1 << 44, slot_bytes=1 << 24))
    assert taken(tmp_path) <= PAGE
    NvmeStore(config(tmp_path)).close()


def test_the_files_are_their_owners_alone(tmp_path):
    NvmeStore(config(tmp_path / "new")).close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "new").iterdir())
