"""One writer of a directory at a time, who leaves nothing of his lock behind."""

import threading

import pytest

from wicore_backend.executor.segments.exclusive import alone_in, exporting_alone


def test_what_was_made_for_the_lock_alone_is_gone_and_what_was_written_stays(tmp_path):
    directory = tmp_path / "of model" / "bf16"
    with exporting_alone(directory):
        assert [path.name for path in directory.iterdir()] == ["exporting.lock"]
    assert not list(tmp_path.iterdir())
    with exporting_alone(directory):
        (directory / "first.onnx").touch()
    assert [path.name for path in directory.iterdir()] == ["first.onnx"]
    (tmp_path / "empty").mkdir()
    with exporting_alone(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists(), "it was there before"


def test_who_fails_leaves_no_more_than_who_does_not(tmp_path):
    with pytest.raises(RuntimeError), exporting_alone(tmp_path / "bf16"):
        raise RuntimeError("no such precision")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"), exporting_alone(tmp_path / "file" / "bf16"):
        pytest.fail("it cannot be made")


def test_a_place_that_cannot_have_a_lock_is_an_error_and_no_endless_wait(tmp_path):
    (tmp_path / "of.lock").symlink_to(tmp_path / "nowhere" / "of.lock")
    with pytest.raises(FileNotFoundError), alone_in(tmp_path, "of.lock", wait=True):
        pytest.fail("there is no such folder")


def test_who_is_not_to_wait_hears_that_somebody_is_there(tmp_path):
    with alone_in(tmp_path, "of.lock", wait=False), alone_in(tmp_path, "another.lock", wait=False):
        with pytest.raises(BlockingIOError), alone_in(tmp_path, "of.lock", wait=False):
            pytest.fail("two at once")
        assert (tmp_path / "of.lock").exists()
    with alone_in(tmp_path, "of.lock", wait=False):
        pass


def test_many_who_wait_come_in_one_by_one_though_each_removes_the_lock(tmp_path):
    inside, most, faults = set[int](), list[int](), list[Exception]()

    def write(number: int) -> None:
        try:
            for _ in range(40):
                with alone_in(tmp_path / "a" / "b", "of.lock", wait=True):
                    inside.add(number)
                    most.append(len(inside))
                    inside.discard(number)
        except Exception as fault:
            faults.append(fault)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not faults
    assert most == [1] * 240
    assert not list(tmp_path.rglob("*.lock"))
