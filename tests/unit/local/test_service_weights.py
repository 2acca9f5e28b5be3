"""Checkpoints on disk: whole or not at all."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fwasync.local.weights import NameTaken, WeightsPath, WeightStore, check_name


def fill_with(text: str):
    def fill(directory: Path) -> None:
        (directory / "w").write_text(text)

    return fill


def fail_half_way(directory: Path) -> None:
    (directory / "w").write_text("half")
    raise OSError(28, "No space left on device")


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path)


PATH = WeightsPath("s:train:0", "weights", "a")


def test_paths_are_read_and_written():
    text = "tinker://s:train:0/weights/a"
    assert WeightsPath.parse(text) == PATH
    assert str(PATH) == text


@pytest.mark.parametrize(
    "text",
    ["", "a", "tinker://s/weights/../a", "tinker://../weights/a", "tinker://s/other/a", "tinker://s/weights/a\n"],
)
def test_what_is_no_path_is_refused(text):
    with pytest.raises(ValueError, match="not a path of this service"):
        WeightsPath.parse(text)


@pytest.mark.parametrize("name", [".", "..", "a/b", "a\\b", "", "-a", "a\n", "é", "x" * 129])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a checkpoint"):
        check_name(name)


def test_what_is_saved_is_listed_newest_first(store):
    paths = [WeightsPath("s:train:0", "weights", "a"), WeightsPath("s:train:1", "sampler_weights", "b")]
    for age, path in enumerate(paths):
        store.write(store.directory(path), fill_with("12345"), {"checkpoint_type": None, "user_metadata": {"k": "v"}})
        os.utime(store.directory(path), (1e9 - age, 1e9 - age))
    (store.directory(paths[0]).parent / ".new-c").mkdir()
    first, second = store.saved()
    assert (first.path, second.path) == tuple(paths)
    assert first.time == datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)
    assert first.size_bytes == 5 + len((first.directory / "notes.json").read_bytes())
    assert first.notes == {"user_metadata": {"k": "v"}}


def test_notes_change_and_the_time_stays(store):
    store.write(store.directory(PATH), fill_with("1"), {"a": 1})
    before = store.saved()[0]
    store.note(PATH, "b", 2)
    after = store.saved()[0]
    assert (after.time, after.notes) == (before.time, {"a": 1, "b": 2})
    with pytest.raises(FileNotFoundError):
        store.note(WeightsPath("s:train:0", "weights", "other"), "b", 2)


def test_what_is_deleted_is_gone_and_its_name_free(store):
    store.write(store.directory(PATH), fill_with("1"), {})
    store.delete(PATH)
    assert store.saved() == []
    assert not list(store.directory(PATH).parent.iterdir())
    with pytest.raises(FileNotFoundError):
        store.delete(PATH)
    store.write(store.directory(PATH), fill_with("2"), {})
    assert (store.directory(PATH) / "w").read_text() == "2"


def test_a_directory_is_written_with_its_notes(store):
    target = store.directory(PATH)
    store.write(target, fill_with("1"), {"checkpoint_type": "base"})
    assert (target / "w").read_text() == "1"
    assert "base" in (target / "notes.json").read_text()
    assert store.checkpoint_names() == ["a"]


def test_a_failure_leaves_nothing_and_spares_the_old_one(store):
    target = store.directory(PATH)
    with pytest.raises(OSError, match="No space"):
        store.write(target, fail_half_way, {})
    assert not list(target.parent.iterdir())
    store.write(target, fill_with("1"), {})
    with pytest.raises(OSError, match="No space"):
        store.write(target, fail_half_way, {}, overwrite=True)
    assert (target / "w").read_text() == "1"
    assert [entry.name for entry in target.parent.iterdir()] == ["a"]


def test_a_name_is_taken_unless_it_may_be_overwritten(store):
    target = store.directory(PATH)
    store.write(target, fill_with("1"), {})
    with pytest.raises(NameTaken):
        store.write(target, fill_with("2"), {})
    store.write(target, fill_with("3"), {}, overwrite=True)
    assert (target / "w").read_text() == "3"
    assert [entry.name for entry in target.parent.iterdir()] == ["a"]


def test_cleaning_finishes_what_a_crash_left(store):
    target = store.directory(PATH)
    store.write(target, fill_with("1"), {})
    # Killed between the two renames of an overwrite, and while another was written.
    target.rename(target.parent / ".old-a")
    (target.parent / ".new-a").mkdir()
    (target.parent / ".new-b").mkdir()
    unnamed = store.unnamed()
    store.write(unnamed, fill_with("u"), {})
    store.clean()
    assert (target / "w").read_text() == "1"
    assert [entry.name for entry in target.parent.iterdir()] == ["a"]
    assert not unnamed.exists()


def test_cleaning_prefers_the_new_one(store):
    target = store.directory(PATH)
    store.write(target, fill_with("new"), {})
    (target.parent / ".old-a").mkdir()
    store.clean()
    assert (target / "w").read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["a"]


def test_only_unnamed_snapshots_are_removed(store):
    unnamed = store.unnamed()
    store.write(unnamed, fill_with("u"), {})
    store.remove(unnamed)
    assert not unnamed.exists()
    with pytest.raises(ValueError, match="not an unnamed snapshot"):
        store.remove(store.directory(PATH))
