"""Mutants of storage: what is written, committed, read and refused."""

from __future__ import annotations

from mutation import Mutant

COMMIT = "test_storage/test_commit.py::"
POWER_LOSS = "test_storage/test_power_loss.py::"
VALIDATE = "test_storage/test_validate.py::"
READER = "test_storage/test_reader.py::"

MUTANTS: dict[str, list[Mutant]] = {
    "storage/files/local.py": [
        Mutant(
            "a file has its name before it is on the disk",
            "_write_file(temporary, data, making, synced=durable)",
            "_write_file(temporary, data, making, synced=False)",
            f"{POWER_LOSS}test_every_tree_outside_of_tmp",
        ),
        Mutant(
            "the name of a file is not on the disk",
            "                if durable:\n                    _sync_directory(there)\n            finally",
            "            finally",
            f"{POWER_LOSS}test_every_tree_outside_of_tmp",
        ),
        Mutant(
            "the name of a shard is not on the disk",
            '                fault_point(f"{point}-renamed")\n                _sync_directory(there)\n',
            '                fault_point(f"{point}-renamed")\n',
            f"{POWER_LOSS}test_every_tree_outside_of_tmp",
        ),
        Mutant(
            "a short write passes for a whole one",
            "        view = view[os.write(descriptor, view) :]\n",
            "        os.write(descriptor, view)\n        break\n",
            "test_storage/test_failing_calls.py::test_writes_that_take_only_a_part",
        ),
        Mutant(
            "a part of another file is read",
            "if hash(Stamp.of(os.fstat(descriptor))) != stamp:",
            "if False:",
            "test_storage/test_files.py::test_a_part_is_read_while_the_file_is_the_same",
        ),
    ],
    "storage/writer.py": [
        Mutant(
            "batches are not checked",
            "        check_batch(self.plan, shard, batch)\n",
            "",
            f"{COMMIT}test_invalid_batches_are_refused_and_not_committed",
        ),
        Mutant(
            "what another process committed is not compared",
            "if stored != mine:",
            "if False:",
            f"{COMMIT}test_what_another_process_committed_stays",
        ),
        Mutant(
            "a seal does not look for its shards",
            "            self._check_directories()\n",
            "",
            f"{COMMIT}test_a_seal_needs_its_shards",
        ),
        Mutant(
            "a damaged directory passes for a whole one",
            "if data is None or sha256(data) != item.sha256:",
            "if data is None:",
            f"{COMMIT}test_a_directory_that_is_there_damaged_is_moved_away",
        ),
        Mutant(
            "a directory of something else becomes a store",
            "    if foreign:\n",
            "    if False:\n",
            f"{COMMIT}test_a_directory_with_other_things_is_refused",
        ),
        Mutant(
            "a store that lost its plan is overwritten",
            "    if records:\n",
            "    if False:\n",
            f"{COMMIT}test_a_store_that_lost_its_plan_is_not_overwritten",
        ),
        Mutant(
            "another plan goes on in a store",
            "if stored.store_id == wanted.store_id:",
            "if True:",
            f"{COMMIT}test_another_plan_is_refused_with_every_difference",
        ),
    ],
    "storage/format/validate.py": [
        Mutant(
            "windows may be negative", "if np.any(batch.window_start < 0):", "if False:", f"{VALIDATE}test_structure"
        ),
        Mutant("a count may be 0", "batch.count == 0,", "batch.count < 0,", f"{VALIDATE}test_structure"),
        Mutant(
            "a batch may have other draws",
            "if batch.draws != plan.target.draws:",
            "if False:",
            f"{VALIDATE}test_structure",
        ),
        Mutant(
            "masses need not add up", "    _check_mass(batch)\n", "", f"{VALIDATE}test_numbers[tail mass does not fit]"
        ),
        Mutant(
            "an id may stand twice in a row",
            "        _refuse(batch, repeated,",
            "        _refuse(batch, repeated & False,",
            f"{VALIDATE}test_structure",
        ),
        Mutant(
            "ids may lie beyond the vocabulary",
            "if not 0 <= extreme < plan.vocab_size:",
            "if not 0 <= extreme:",
            f"{VALIDATE}test_structure",
        ),
        Mutant(
            "a head may rise",
            '    _refuse_entry(batch, rising, batch.head_size, "logprob rises within a row")\n',
            "",
            f"{VALIDATE}test_structure[head rises]",
        ),
        Mutant(
            "the last token may have a row",
            "wrong = filled[batch.has_row[last]]",
            "wrong = filled[:0]",
            f"{VALIDATE}test_a_row_at_the_last_token_of_a_sequence",
        ),
    ],
    "storage/reader.py": [
        Mutant(
            "a number below 0 counts from the end",
            "int(wanted.min()) < 0 or ",
            "",
            f"{READER}test_numbers_out_of_range",
        ),
        Mutant(
            "an unfinished store is read unasked",
            "if not allow_partial:",
            "if False:",
            f"{READER}test_an_unfinished_store_is_refused_with_its_counts",
        ),
        Mutant(
            "splits are mixed",
            "for item in seal.shards if item.split == split)",
            "for item in seal.shards)",
            f"{READER}test_splits_do_not_share_a_document",
        ),
    ],
    "storage/commit/open_shard.py": [
        Mutant(
            "contents are not compared with their record",
            "if sha256(data) != expected.sha256:",
            "if False:",
            f"{READER}test_damage_after_the_first_read_is_found",
        ),
    ],
    "storage/plan.py": [
        Mutant(
            "every seed holds out the same",
            'f"{self.seed}:{document}"',
            'f"{document}"',
            "test_storage/test_plan.py::test_what_is_held_out_is_what_it_was",
        ),
    ],
    "storage/target.py": [
        Mutant(
            "a temperature may be stored twice",
            "if any(right <= left for left, right",
            "if any(right < left for left, right",
            "test_pipeline/test_config.py::test_extract_problems_name_line_key_and_remedy",
        ),
        Mutant(
            "a kind may lack its samples",
            "if holds.draws and not 0 < self.draws <= LARGEST_DRAWS:",
            "if False:",
            "test_pipeline/test_config.py::test_extract_problems_name_line_key_and_remedy",
        ),
    ],
}
