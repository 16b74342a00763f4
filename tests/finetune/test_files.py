from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.files import atomic_folder, write_atomic, write_json
from finetune.run_dir import RunDir


def test_atomic_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def fail_while_writing() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "part").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_writing()
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with atomic_folder(target) as temporary:
            (temporary / "file").write_text(text)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (target / "file").read_text() == text


def test_leftovers_of_a_kill_are_removed_and_the_old_folder_is_restored(tmp_path: Path) -> None:
    for name in (".model.bak", ".model.finetune-new", ".model.finetune-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model"):
        raise RuntimeError
    # Killed between the two renames: the old folder is restored.
    assert (tmp_path / "model" / "file").read_text() == ".model.finetune-old"
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.bak"}


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": "nan"}
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert json.loads(path.read_text()) == {"x": "nan"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_run_folder_can_be_locked_only_once(tmp_path: Path) -> None:
    from finetune.errors import UserError

    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    first.acquire()
    with pytest.raises(UserError, match="another process"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
