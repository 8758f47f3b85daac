"""Mutants of stages: training, batches, targets, losses, corpus."""

from __future__ import annotations

from mutation import Mutant

BY_HAND = "test_pipeline/test_train_by_hand.py::test_steps_are_those_of_a_loop_that_is_written_out"
TRAIN = "test_pipeline/test_train.py::"
REFUSALS = "test_pipeline/test_train_refusals.py::"
STEP = "test_stages/test_step.py::"
TRAINING = "test_stages/test_training.py::"
RUN_FILES = "test_stages/test_run_files.py::"
SCHEDULE = "test_stages/test_schedule.py::"
BATCHES = "test_stages/test_batches.py::"
ASSEMBLE = "test_stages/test_targets_assemble.py::"
LOSSES = "test_stages/test_losses/"
ROWS = "test_stages/test_targets_rows.py::"

MUTANTS: dict[str, list[Mutant]] = {
    "stages/training/step.py": [
        Mutant("the learning rate is not set", "    set_learning_rate(optimizer, lr)\n", "", BY_HAND),
        Mutant(
            "the gradient may be no number",
            '    _require_finite("norm of the gradient", norm, number)\n',
            "",
            f"{STEP}test_what_is_no_number_stops_before_the_weights_move",
        ),
        Mutant(
            "the loss may be no number",
            '    _require_finite("loss", losses.loss, number)\n',
            "",
            f"{STEP}test_what_is_no_number_stops_before_the_weights_move",
        ),
        Mutant(
            "the held-out loss may be no number",
            "if not math.isfinite(losses.loss):",
            "if False:",
            f"{STEP}test_a_heldout_loss_that_is_no_number_is_told",
        ),
        Mutant(
            "weights may be no numbers",
            "if not is_finite(parameter):",
            "if False:",
            f"{RUN_FILES}test_weights_that_are_no_numbers_are_told_by_name",
        ),
        Mutant(
            "a step is the mean of its micro-batches' means",
            "parts = learner.parts(batch, step.rows)",
            "parts = learner.parts(batch, batch.rows * len(step.batches))",
            BY_HAND,
        ),
        Mutant(
            "a validation is the mean of its micro-batches' means",
            "learner.parts(batch, rows))",
            "learner.parts(batch, batch.rows * len(batches)))",
            BY_HAND,
        ),
        Mutant(
            "validation drops out",
            "model.train(mode=False)",
            "model.train()",
            f"{STEP}test_validation_leaves_the_student_training_and_takes_no_gradient",
        ),
        Mutant(
            "after a validation nothing drops out",
            "    model.train()\n",
            "",
            f"{STEP}test_validation_leaves_the_student_training_and_takes_no_gradient",
        ),
        Mutant("gradients of the step before stay", "    optimizer.zero_grad(set_to_none=True)\n", "", BY_HAND),
        Mutant(
            "nothing is clipped",
            "math.inf if clip_norm is None else clip_norm",
            "math.inf",
            f"{STEP}test_the_gradient_is_clipped_but_its_own_norm_is_told[0.01]",
        ),
        Mutant(
            "without a limit it is clipped to 1",
            "math.inf if clip_norm is None else clip_norm",
            "clip_norm or 1.0",
            f"{STEP}test_the_gradient_is_clipped_but_its_own_norm_is_told[None]",
        ),
        Mutant(
            "a divergence that was not computed is told",
            "None if self.kd_ratio == 0.0 else kd",
            "kd",
            f"{STEP}test_without_the_teacher_nothing_but_cross_entropy_is_told",
        ),
        Mutant(
            "a teacher may change during a validation",
            "    with learner.watched():\n        for batch in batches:",
            "    if True:\n        for batch in batches:",
            "test_pipeline/test_train_online.py::test_a_teacher_that_changes_during_a_step_ends_the_run[validation]",
        ),
    ],
    "stages/losses/engine/call.py": [
        Mutant(
            "sums over no rows are divided by 0",
            "return float(max(rows, 1))",
            "return float(rows)",
            f"{STEP}test_a_step_without_rows_is_nothing_to_learn_from",
        ),
    ],
    "stages/training/optimizer.py": [
        Mutant(
            "norms decay",
            '"weight_decay": 0.0}',
            '"weight_decay": settings.weight_decay}',
            f"{STEP}test_only_matrices_decay_and_tied_weights_are_moved_once",
        ),
        Mutant("eps is the library's", "eps=settings.eps, ", "", BY_HAND),
        Mutant("betas are the library's", "betas=settings.betas, ", "", BY_HAND),
        Mutant(
            "norms keep the first learning rate",
            "in optimizer.param_groups:",
            "in optimizer.param_groups[:1]:",
            BY_HAND,
        ),
    ],
    "stages/training/schedule.py": [
        Mutant("the first step has no learning rate", "return (step + 1) / self", "return step / self", BY_HAND),
        Mutant("all schedules come down to 0", "self.min_factor + (1.0 - self.min_factor) * ", "", BY_HAND),
        Mutant(
            "the share of the divergence is warmed up twice",
            "self.falls_with.decline(step)",
            "self.falls_with.factor(step)",
            BY_HAND,
        ),
        Mutant(
            "wsd decays a step too early",
            "max(self.steps - step, 0)",
            "max(self.steps - step - 1, 0)",
            f"{SCHEDULE}test_schedules_warm_up_to_the_peak_and_come_down_as_they_should",
        ),
    ],
    "stages/training/checkpoint.py": [
        Mutant(
            "one checkpoint too many is kept",
            "older[self.keep - 1 :]",
            "older[self.keep :]",
            f"{TRAINING}test_only_the_newest_checkpoints_are_kept",
        ),
        Mutant(
            "a checkpoint of another store is taken",
            "if digest != self.store_digest:",
            "if False:",
            f"{TRAINING}test_a_checkpoint_of_another_store_is_not_taken",
        ),
        Mutant(
            "contents are not compared",
            '"sha256": digest}',
            '"sha256": ""}',
            f"{TRAINING}test_a_damaged_checkpoint_gives_way_to_the_one_before_it",
        ),
        Mutant(
            "random numbers begin anew",
            "    _restore_random(states)\n",
            "",
            f"{TRAINING}test_a_checkpoint_brings_back_weights_moments_and_random_numbers",
        ),
        Mutant(
            "moments begin anew",
            "    _restore_optimizer(model, optimizer, moments)\n",
            "",
            f"{TRAINING}test_a_checkpoint_brings_back_weights_moments_and_random_numbers",
        ),
        Mutant(
            "buffers are not saved",
            "(*model.named_parameters(), *model.named_buffers())",
            "(*model.named_parameters(),)",
            f"{RUN_FILES}test_buffers_come_back_but_for_those_that_a_model_makes_itself",
        ),
        Mutant(
            "a damaged checkpoint stays in the way",
            "                os.rename(directory, aside)\n",
            "                pass\n",
            f"{RUN_FILES}test_resuming_sets_newer_checkpoints_aside",
        ),
    ],
    "stages/durable.py": [
        Mutant(
            "files get their names before they are on the disk",
            "(*temporary.iterdir(), temporary)",
            "(temporary,)",
            f"{RUN_FILES}test_a_directory_is_on_the_disk_before_it_has_its_name",
        ),
        Mutant(
            "names in a directory are not on the disk",
            "(*temporary.iterdir(), temporary)",
            "(*temporary.iterdir(),)",
            f"{RUN_FILES}test_a_directory_is_on_the_disk_before_it_has_its_name",
        ),
        Mutant(
            "a directory's own name is not on the disk",
            "    _sync(target.parent)\n",
            "",
            f"{RUN_FILES}test_a_directory_is_on_the_disk_before_it_has_its_name",
        ),
        Mutant(
            "a file gets its name before it is on the disk",
            "        _sync(temporary)\n",
            "",
            f"{RUN_FILES}test_a_file_is_on_the_disk_before_it_has_its_name",
        ),
        Mutant(
            "a file's name is not on the disk",
            "        _sync(path.parent)\n",
            "",
            f"{RUN_FILES}test_a_file_is_on_the_disk_before_it_has_its_name",
        ),
        Mutant(
            "weights are their owner's alone",
            "            _use_ordinary_modes(temporary)\n",
            "",
            f"{RUN_FILES}test_what_is_written_may_be_read_as_any_file_of_the_process",
        ),
    ],
    "stages/training/metrics.py": [
        Mutant(
            "the curve is not on the disk",
            "            os.fsync(self._file.fileno())\n",
            "            pass\n",
            f"{TRAIN}test_a_checkpoint_is_never_ahead_of_its_curve",
        ),
        Mutant(
            "the line of the checkpoint's step is lost",
            '["step"] <= last_step]',
            '["step"] < last_step]',
            f"{TRAINING}test_the_curve_is_cut_back_to_the_checkpoint",
        ),
        Mutant(
            "a line without its end is kept",
            'isinstance(record, dict) and line.endswith(b"\\n") else None',
            "isinstance(record, dict) else None",
            f"{RUN_FILES}test_the_curve_ends_before_what_is_not_whole",
        ),
        Mutant(
            "lines behind a broken one are kept",
            "elif torn is None and problem is None:",
            "elif problem is None:",
            f"{RUN_FILES}test_a_damaged_line_in_the_middle_of_the_curve_is_told_and_costs_no_later_line",
        ),
    ],
    "stages/training/run.py": [
        Mutant(
            "the seed of a run may change",
            '        "run",\n',
            '        "run",\n        "seed",\n',
            f"{REFUSALS}test_what_changes_a_result_may_not_change_within_a_run[seed]",
        ),
        Mutant(
            "another machine's attention is refused",
            '        "attention",\n',
            "",
            f"{REFUSALS}test_what_changes_a_result_may_not_change_within_a_run[attention]",
        ),
        Mutant(
            "the last step may get another learning rate",
            "not 0 < step <= done",
            "not 0 < step < done",
            f"{RUN_FILES}test_every_step_done_keeps_its_learning_rate",
        ),
        Mutant(
            "two processes train in one directory",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            f"{TRAINING}test_two_processes_do_not_train_in_one_directory",
        ),
    ],
    "stages/batches/microbatch.py": [
        Mutant("labels are the tokens before", "np.roll(token_T, -1)", "np.roll(token_T, 1)", BY_HAND),
        Mutant(
            "sequences of a micro-batch see each other",
            "position_T = rank_in_row(lengths(batch))",
            "position_T = np.arange(len(batch.tokens), dtype=np.int64)",
            BY_HAND,
        ),
        Mutant("entropy has the wrong sign", "entropy=batch.entropy,", "entropy=-batch.entropy,", BY_HAND),
        Mutant("entropy is another number", "entropy=batch.entropy,", "entropy=batch.next_logprob,", BY_HAND),
    ],
    "stages/batches/sequences.py": [
        Mutant(
            "a micro-batch holds one token too many",
            "if filled + length > tokens_per_batch:",
            "if filled + length > tokens_per_batch + 1:",
            f"{BATCHES}test_micro_batches_hold_all_sequences_in_order_within_the_bound",
        ),
        Mutant(
            "a sequence may be longer than a micro-batch",
            "if length > tokens_per_batch:",
            "if False:",
            f"{BATCHES}test_a_sequence_longer_than_a_micro_batch_is_refused_with_both_numbers",
        ),
    ],
    "stages/batches/order.py": [
        Mutant(
            "every epoch has the same order",
            "int(epoch)",
            "0",
            f"{BATCHES}test_each_epoch_holds_every_sequence_once_in_another_order",
        ),
        Mutant(
            "every seed has the same order",
            "self.seed, ",
            "0, ",
            f"{BATCHES}test_each_epoch_holds_every_sequence_once_in_another_order",
        ),
    ],
    "stages/batches/steps.py": [
        Mutant(
            "a sequence is lost between two steps",
            "            chosen, tokens = [], 0\n",
            "            chosen, tokens = [], 0\n            continue\n",
            BY_HAND,
        ),
        Mutant(
            "validation takes the first sequences",
            "np.arange(count) * len(source) // count",
            "np.arange(count)",
            f"{BATCHES}test_validation_takes_sequences_that_are_spread_evenly",
        ),
        Mutant(
            "validation may have no rows",
            "for batch in microbatches(read, shape) if batch.rows)",
            "for batch in microbatches(read, shape))",
            f"{BATCHES}test_validation_leaves_out_what_has_no_rows",
        ),
        Mutant(
            "a resumed run begins its first step anew",
            "_sequences(source, order, cursor, targets",
            "_sequences(source, order, 0, targets",
            f"{BATCHES}test_a_step_resumed_at_its_cursor_is_the_same_step",
        ),
        Mutant(
            "rows are read for cross-entropy alone",
            "with_targets=shape.with_targets, ignore_index",
            "with_targets=True, ignore_index",
            f"{BATCHES}test_without_targets_no_teacher_row_is_read",
        ),
    ],
    "stages/targets/rows.py": [
        Mutant(
            "the tail is only what was never a candidate",
            "outside_N + prob_NK.masked_fill(head_NK, 0.0).sum(-1)",
            "outside_N",
            f"{ROWS}test_the_head_of_topp_is_the_least_that_reaches_its_mass",
        ),
        Mutant(
            "logits may be no numbers",
            "    _refuse_nan(log_sum_N, at)\n",
            "",
            f"{ROWS}test_broken_logits_name_document_and_position",
        ),
        Mutant(
            "a head of topp is one entry short",
            "return 1 + (tail_NK * mass > ",
            "return 0 + (tail_NK * mass > ",
            f"{ROWS}test_the_head_of_topp_is_the_least_that_reaches_its_mass",
        ),
        Mutant(
            "the entropy at a temperature is not divided by it",
            "(weight_NV * shifted_NV).sum(-1) / temperature",
            "(weight_NV * shifted_NV).sum(-1)",
            f"{ROWS}test_other_temperatures_against_float64",
        ),
    ],
    "stages/targets/entries.py": [
        Mutant(
            "all positions of a document get the same draws",
            "_absorb(_absorb(mix64(np.array([seed], dtype=np.uint64)), document_N), position_N)",
            "_absorb(mix64(np.array([seed], dtype=np.uint64)), document_N)",
            f"{ROWS}test_random_numbers_are_what_they_were",
        ),
        Mutant(
            "a block without mass may be drawn",
            "torch.searchsorted(mass_NG, target_NM, right=True)",
            "torch.searchsorted(mass_NG, target_NM)",
            f"{ROWS}test_a_draw_is_never_what_has_no_mass",
        ),
        Mutant(
            "equal logits come in any order",
            "ids_NK.sort(dim=1)",
            "ids_NK.sort(dim=1, descending=True)",
            f"{ROWS}test_equal_logits_keep_the_order_of_ids",
        ),
    ],
    "stages/targets/positions.py": [
        Mutant(
            "draws begin anew in each window",
            "sequence.window_start + found",
            "found",
            "test_stages/test_targets_assemble.py::test_wanted_positions_and_mask",
        ),
    ],
    "stages/targets/assemble.py": [
        Mutant(
            "rows without a tail have samples",
            "empty_R=np.isneginf(rows.tail_logit)",
            "empty_R=np.zeros(len(rows), bool)",
            f"{ASSEMBLE}test_any_order_of_computation_gives_the_same_batch",
        ),
    ],
    "stages/corpus/tokenize.py": [
        Mutant(
            "the first token of a completion is not learned",
            "max(first_row, tokenized.prompt - 1) - start",
            "max(first_row, tokenized.prompt) - start",
            "test_stages/test_corpus_prompts.py::test_rows_predict_what_follows_the_prompt",
        ),
        Mutant(
            "what windows repeat is learned twice",
            "yield start, end, max(start, predicted - 1)",
            "yield start, end, start",
            "test_stages/test_corpus_tokenize.py::test_each_token_is_predicted_once",
        ),
        Mutant(
            "windows may be too short",
            "if end - start >= rendering.min_tokens and has_row_T.any():",
            "if has_row_T.any():",
            "test_stages/test_corpus_tokenize.py::test_short_documents_and_windows_are_left_out",
        ),
        Mutant(
            "ids may lie beyond the teacher's",
            "if len(tokens_T) and int(tokens_T.max()) >= rendering.vocab_size:",
            "if False:",
            "test_stages/test_corpus_tokenize.py::test_an_id_beyond_the_teacher_is_refused",
        ),
    ],
    "stages/teacher/batching.py": [
        Mutant(
            "a batch is never full",
            "count * longest <= self.padded_tokens",
            "count * longest < self.padded_tokens",
            "test_stages/test_teacher_batching.py::test_each_sequence_once_within_limits",
        ),
    ],
    "stages/student/identity.py": [
        Mutant(
            "a head may be too small",
            "rows < vocab_size or (not same",
            "(not same",
            "test_stages/test_student.py::test_really_different_vocabularies_are_refused_with_both_sizes",
        ),
    ],
    "stages/losses/divergences.py": [
        Mutant(
            "the gradient of jsd has the other weight",
            "h = (log_m_q * q).mul_(-rest)",
            "h = (log_m_q * q).mul_(-beta)",
            f"{LOSSES}test_exactness.py::test_float32_logits",
        ),
        Mutant(
            "both parts of a mixture have the same weight",
            "forward_d.mul_(self.weight).add_(reverse_d, alpha=1.0 - self.weight)",
            "forward_d.mul_(self.weight).add_(reverse_d, alpha=self.weight)",
            f"{LOSSES}test_exactness.py::test_bfloat16_is_rounded_but_not_biased",
        ),
        Mutant(
            "digits cancel where the student rules out a token",
            "h = torch.where(x < math.log(0.01), series, h)",
            "pass",
            f"{LOSSES}test_exactness.py::test_float32_logits",
        ),
    ],
    "stages/losses/tail.py": [
        Mutant(
            "samples weigh as often as they were drawn",
            "targets.count_NE.to(dtype) / targets.draws",
            "targets.count_NE.to(dtype)",
            BY_HAND,
        ),
        Mutant(
            "a label in the head gets its residual twice",
            "outside_N = torch.where(is_label_NE.any(-1), 0.0, r_N)",
            "outside_N = r_N",
            f"{LOSSES}test_sparse.py::test_fused_value_and_gradients",
        ),
        Mutant(
            "renormalised heads are not",
            "    log_p_NE = log_p_NE - log_p_NE.logsumexp(-1, keepdim=True)\n",
            "",
            f"{LOSSES}test_exactness.py::test_bfloat16_is_rounded_but_not_biased",
        ),
        Mutant(
            "samples at a temperature have the wrong weight",
            "(1.0 / temperature - 1.0)",
            "(1.0 / temperature)",
            f"{LOSSES}test_sparse.py::test_fused_value_and_gradients",
        ),
    ],
    "stages/losses/engine/chunk.py": [
        Mutant(
            "the scale of logits is forgotten",
            "    logits_CV.mul_(scale)\n",
            "",
            f"{LOSSES}test_sparse.py::test_fused_value_and_gradients",
        ),
    ],
}
