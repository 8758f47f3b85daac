"""Damage of every kind to every file of a store: named, not one row returned, found by verify, mended by repair."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import storage_cases as cases

from storage.commit.records import CommitRecord
from storage.errors import CorruptionError, DistillError, UsageError
from storage.reader import StoreReader
from storage.tools.repair import repair
from storage.tools.verify import verify

SHARD = 1  # the damaged one


def objects_of(store: Path) -> list[str]:
    """Every file of the damaged shard, and its record."""
    number = f"{SHARD:06d}"
    return [name for name in cases.contents(store) if name.startswith((f"shards/{number}-", f"commits/{number}"))]


def file_kinds() -> list[str]:
    """Names of a shard's files without the content hash, the same in every store of this plan."""
    arrays = [
        "tokens", "has_row", "token_offset", "row_offset", "head_offset", "tail_offset", "document", "window_start",
        "token_end_byte", "head_size", "head_ids", "logprob", "tail_size", "tail_ids", "count", "tail_logit",
        "logsumexp", "entropy", "next_logprob",
    ]  # fmt: skip
    objects = [f"{name}/c/0/0" if name in ("head_ids", "logprob") else f"{name}/c/0" for name in arrays]
    return ["zarr.json", *objects, *(f"{name}/zarr.json" for name in arrays), "record"]


def name_of(store: cases.Store, kind: str, shard: int = SHARD) -> str:
    if kind == "record":
        return f"commits/{shard:06d}.json"
    return cases.find(store, f"shards/{shard:06d}-{'?' * 16}/{kind}")


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    bit %= len(data) * 8
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def swap(store: cases.Store, left: str, right: str) -> None:
    content = cases.contents(store)
    cases.put(store, left, content[right])
    cases.put(store, right, content[left])


def into_a_directory(store: cases.Store, name: str, kind: str) -> None:
    cases.drop(store, name)
    cases.put(store, f"{name}/file", b"x")


def changed(change):
    return lambda store, name, kind: cases.put(store, name, change(cases.contents(store)[name], kind))


DAMAGES = {
    "missing": lambda store, name, kind: cases.drop(store, name),
    "empty": changed(lambda data, kind: b""),
    "truncated": changed(lambda data, kind: data[:-1]),
    "longer": changed(lambda data, kind: data + b"\n"),
    "flipped": changed(lambda data, kind: flip(data, 1009 * len(kind) + 13)),
    "swapped": lambda store, name, kind: swap(store, name, name_of(store, kind, SHARD + 1)),
    "directory": into_a_directory,
}


@pytest.fixture
def store(tmp_path, sealed) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "store"))


@pytest.fixture
def any_store(fresh, sealed) -> cases.Store:
    return cases.copy(sealed, fresh)


def read_shard(store: cases.Store, shard: int):
    reader = StoreReader(store)
    first = sum(item.sequences for item in reader.shards if item.shard < shard)
    return reader.read(range(first, first + reader.shards[shard].sequences))


def test_the_battery_covers_every_file(sealed):
    assert {name_of(sealed, kind) for kind in file_kinds()} == set(objects_of(sealed))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", file_kinds())
def test_no_row_of_a_damaged_shard_is_returned(store, damage, kind):
    before = cases.tree(store)
    DAMAGES[damage](store, name_of(store, kind), kind)
    if cases.tree(store) == before:
        assert damage == "swapped", "only identical files can be swapped without damage"
        return
    with pytest.raises(CorruptionError) as caught:
        read_shard(store, SHARD)
    message = str(caught.value)
    assert f"shard {SHARD} (train, documents 6 to 11)" in message
    assert f"pipeline repair {store}" in message
    assert (f"{SHARD:06d}.json" if kind == "record" else kind) in message
    if kind != "record":  # without it, nothing says how many sequences come before those of the next shard
        assert len(read_shard(store, 0)) > 0, "the others can still be read"
    assert {problem.shard for problem in verify(store).problems} >= {SHARD}
    if damage not in ("flipped", "swapped"):
        assert SHARD in {problem.shard for problem in verify(store, quick=True).problems}, "names and sizes tell"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["zarr.json", "head_ids/c/0/0", "count/zarr.json", "record"])
def test_a_repaired_store_is_as_before(any_store, damage, kind, sealed):
    DAMAGES[damage](any_store, name_of(any_store, kind), kind)
    repair(any_store, apply=True)
    cases.write_store(any_store)
    assert cases.tree(any_store) == cases.tree(sealed)


@pytest.mark.parametrize("name", ["plan.json", "remap", "sealed.json", "tokenizer/tokenizer.json.xz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "longer", "flipped"])
def test_damaged_files_of_the_whole_store(any_store, sealed, name, damage):
    DAMAGES[damage](any_store, name, name)
    expected = UsageError if damage == "missing" and name in ("plan.json", "sealed.json") else CorruptionError
    with pytest.raises(expected) as caught:
        StoreReader(any_store).tokenizer_files()
    if expected is CorruptionError:
        assert name in str(caught.value)
        assert [problem.name for problem in verify(any_store).problems] == [name]
        assert verify(any_store, quick=True).exit_code == 4
    if name == "plan.json":
        with pytest.raises(DistillError):
            repair(any_store, apply=True)
        return
    repair(any_store, apply=True)
    cases.write_store(any_store)
    assert cases.tree(any_store) == cases.tree(sealed)


@pytest.mark.parametrize("name", ["remap", "sealed.json", "tokenizer/tokenizer_config.json.xz"])
def test_every_flipped_bit_of_the_store_wide_files_is_found(any_store, name):
    good = cases.contents(any_store)[name]
    for bit in range(0, len(good) * 8, max(1, len(good) // 15)):
        cases.put(any_store, name, flip(good, bit))
        with pytest.raises(CorruptionError, match=name):
            StoreReader(any_store).tokenizer_files()


def test_two_whole_shards_swapped(store):
    (left,), (right,) = ((store / "shards").glob(f"{shard:06d}-*") for shard in (0, 1))
    left.rename(store / "aside")
    right.rename(left)
    (store / "aside").rename(right)
    for shard in (0, 1):
        with pytest.raises(CorruptionError, match=f"shard {shard}"):
            read_shard(store, shard)
    assert {problem.shard for problem in verify(store).problems} == {0, 1}


def test_two_records_swapped(any_store):
    swap(any_store, name_of(any_store, "record", 0), name_of(any_store, "record", 1))
    with pytest.raises(CorruptionError, match="another shard's"):
        read_shard(any_store, 0)


def test_a_record_of_another_store(store, tmp_path):
    cases.write_store(tmp_path / "other", cases.make_plan(documents_per_shard=6, rendering={"window": 16}))
    shutil.copy(tmp_path / "other" / name_of(store, "record"), store / name_of(store, "record"))
    with pytest.raises(CorruptionError, match="another store's"):
        read_shard(store, SHARD)
    with pytest.raises(CorruptionError, match="another store's"):
        cases.open_writer(store, cases.make_plan()).missing()


def test_a_consistent_forgery_of_one_shard_is_found_by_the_seal(store, tmp_path):
    """Another run of the same plan wrote other content: its record is good, but it is not the sealed one."""
    plan = cases.make_plan()
    writer = cases.open_writer(tmp_path / "other", plan)
    writer.commit(plan.shards()[SHARD], cases.make_batch(plan, plan.shards()[SHARD], longest=8))
    shutil.copytree(tmp_path / "other" / "shards", store / "shards", dirs_exist_ok=True)
    shutil.copy(tmp_path / "other" / name_of(store, "record"), store / "commits")
    with pytest.raises(CorruptionError, match="not the sealed one"):
        read_shard(store, SHARD)
    assert verify(store).problems[0].shard == SHARD


def test_a_foreign_file_inside_a_shard_is_damage(any_store, sealed):
    cases.put(any_store, name_of(any_store, "zarr.json").replace("zarr.json", "notes.txt"), b"mine")
    report = verify(any_store)
    assert [problem.message for problem in report.problems] == ["a foreign file"]
    assert report.exit_code == 4
    assert verify(any_store, quick=True).exit_code == 4
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"shard 1 .* notes.txt: a foreign file") as caught:
            read_shard(any_store, SHARD)
        assert caught.value.fix == f"run `pipeline repair {any_store}`: it moves away what is too much"
    (action,) = repair(any_store, apply=True)
    assert action.name.endswith("/notes.txt"), "the shard stays: nothing of it is lost"
    assert cases.tree(any_store) == cases.tree(sealed)
    assert verify(any_store).exit_code == 0


def test_orphans_are_a_warning(store):
    (store / "tmp" / "123-abc").mkdir()
    (store / "shards" / "000001-0123456789abcdef").mkdir()
    (store / "README").write_text("mine")
    report = verify(store)
    assert report.exit_code == 0
    assert len(report.warnings) == 3


def test_a_good_store(store):
    before = cases.tree(store)
    for quick in (False, True):
        report = verify(store, quick=quick)
        assert (report.problems, report.warnings, report.exit_code) == ([], [], 0)
        assert (report.shards, report.committed, report.sealed) == (5, 5, True)
    assert report.rows == StoreReader(store).rows + StoreReader(store, split="heldout").rows
    assert repair(store, apply=True) == []
    assert cases.tree(store) == before


def test_an_unsealed_store_is_no_damage(tmp_path):
    cases.write_store(tmp_path / "store", shards=[2])
    report = verify(tmp_path / "store")
    assert report.exit_code == 0
    assert report.warnings == ["not sealed: 1 of 5 shards are committed"]


def test_a_repair_only_shows_what_it_would_do(any_store):
    cases.drop(any_store, name_of(any_store, "entropy/c/0"))
    before = cases.tree(any_store)
    actions = repair(any_store, apply=False)
    assert cases.tree(any_store) == before
    names = [action.name for action in actions]
    assert names[0].startswith("shards/000001-")
    assert names[1:] == ["sealed.json", "commits/000001.json"], "the seal before the record, the record last"
    assert all(action.moved_to is None for action in actions)


@pytest.mark.parametrize("name", ["remap", "tokenizer/tokenizer.json.xz"])
def test_a_repair_names_what_is_missing_though_there_is_nothing_to_move(any_store, sealed, name):
    cases.drop(any_store, name)
    (action,) = repair(any_store, apply=True)
    assert (action.name, action.missing, action.moved_to) == (name, True, None)
    cases.write_store(any_store)
    assert verify(any_store).exit_code == 0
    assert cases.tree(any_store) == cases.tree(sealed)


def test_a_repair_that_is_cut_off_is_finished_by_the_next(store, sealed, monkeypatch):
    from storage.files.local import LocalFiles

    real = LocalFiles.quarantine
    for steps in range(3):
        cases.drop(store, name_of(store, "entropy/c/0"))
        moved = []

        def limited(self, name, steps=steps, moved=moved):
            if len(moved) == steps:
                raise KeyboardInterrupt
            moved.append(name)
            return real(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(LocalFiles, "quarantine", limited)
            with pytest.raises(KeyboardInterrupt):
                repair(store, apply=True)
        with pytest.raises(DistillError):
            read_shard(store, SHARD)
        repair(store, apply=True)
        cases.write_store(store)
        assert cases.tree(store) == cases.tree(sealed)


def test_a_recomputed_shard_that_differs_is_told(any_store, caplog):
    """A repaired shard whose content comes out different: the rest of the store was made under other conditions."""
    cases.drop(any_store, name_of(any_store, "entropy/c/0"))
    repair(any_store, apply=True)
    plan = cases.make_plan()
    writer = cases.open_writer(any_store, plan)
    (shard,) = writer.missing()
    writer.commit(shard, cases.make_batch(plan, shard, longest=9))
    assert "differs from what it was" in caplog.text


def test_a_recomputed_shard_that_is_the_same_is_not(any_store, caplog):
    cases.drop(any_store, name_of(any_store, "entropy/c/0"))
    repair(any_store, apply=True)
    cases.write_store(any_store)
    assert "differs" not in caplog.text


def test_verify_checks_what_rows_mean(tmp_path, monkeypatch):
    """A writer with a defect has committed a shard whose hashes are all right."""
    import storage.writer

    monkeypatch.setattr(storage.writer, "check_batch", lambda *arguments: None)
    plan = cases.make_plan()
    writer = cases.open_writer(tmp_path / "store", plan)
    batch = cases.make_batch(plan, plan.shards()[0])
    batch.entropy[2] = float("nan")
    writer.commit(plan.shards()[0], batch)
    (problem,) = verify(tmp_path / "store").problems
    assert "entropy is NaN" in problem.message
    assert verify(tmp_path / "store", quick=True).problems == []


def test_sizes_that_contradict_each_other_are_told_of_the_whole_shard(tmp_path, monkeypatch):
    import storage.writer

    monkeypatch.setattr(storage.writer, "check_batch", lambda *arguments: None)
    writer = cases.open_writer(tmp_path / "store", cases.make_plan())
    shard = writer.plan.shards()[0]
    batch = cases.make_batch(writer.plan, shard)
    batch.tail_size[:] = batch.tail_size[::-1].copy()
    record = writer.commit(shard, batch)
    reader = StoreReader(tmp_path / "store", allow_partial=True)
    with pytest.raises(CorruptionError) as caught:
        reader.read(range(len(reader)))
    assert caught.value.what.endswith(" is damaged: its rows: the row sizes do not add up to tail_offset")
    assert caught.value.where == f"{tmp_path}/store/{record.path}"


def test_record_names_its_directory_by_content(sealed):
    record = CommitRecord.from_json((sealed / name_of(sealed, "record")).read_bytes())
    assert name_of(sealed, "zarr.json") == f"{record.path}/zarr.json"
