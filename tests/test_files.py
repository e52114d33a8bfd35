from __future__ import annotations

import pytest

from cxr_tf.errors import CxrError, nearest
from cxr_tf.files import WriteError, replacing, writable_folder


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_ends_well_replaces_it_and_makes_folders(tmp_path):
    with replacing(tmp_path / "new" / "a.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")
    assert (tmp_path / "new" / "a.png").read_bytes() == b"x"


def test_no_room_and_no_folder_are_errors(tmp_path):
    with pytest.raises(WriteError, match="MB are free"):
        writable_folder(tmp_path, need_bytes=10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        writable_folder(tmp_path / "file" / "folder")
    assert issubclass(WriteError, CxrError)


def test_nearest():
    assert nearest("densnet121", ["densenet121", "resnet50v2"]) == ' Did you mean "densenet121"?'
    assert nearest("xyz", ["densenet121"]) == ""


def test_a_folder_replaces_a_folder_and_a_file_never_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    with replacing(tmp_path / "a") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    with pytest.raises(WriteError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
