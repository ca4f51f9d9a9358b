"""Files that are written atomically, and what is no file."""

import os
import threading

import pytest

from omniad_edge.files import atomic_write


def write(path, text: str = "new") -> None:
    with atomic_write(path) as part:
        part.write_text(text)


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real" / "x.json", tmp_path / "x.json"
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    write(link)
    assert link.is_symlink() and real.read_text() == "new"
    assert sorted(path.name for path in real.parent.iterdir()) == ["x.json"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write(pipe)
    reader.join(5)
    assert got == ["new"] and pipe.is_fifo()


def test_a_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file to write, this is a folder"):
        write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
