"""Mutants of pipeline: the training loop, evaluation, and what the configuration guards."""

from __future__ import annotations

from mutation import Mutant

BY_HAND = "test_pipeline/test_train_by_hand.py::test_steps_are_those_of_a_loop_that_is_written_out"
TRAIN = "test_pipeline/test_train.py::"
REFUSALS = "test_pipeline/test_train_refusals.py::"
EVALUATE = "test_pipeline/test_evaluate.py::"
OPTIONS = "test_pipeline/test_cli_train.py::test_options_reach_what_they_are_for"
CONFIG = "test_pipeline/test_config.py::"

MUTANTS: dict[str, list[Mutant]] = {
    "pipeline/train.py": [
        Mutant("the learning rate is that of the next step", "factor(progress.step)", "factor(number)", BY_HAND),
        Mutant(
            "the share of the divergence stands still",
            "kd_ratio=recipe.kd_ratio.ratio(progress.step)",
            "kd_ratio=config.kd_ratio",
            BY_HAND,
        ),
        Mutant(
            "validation has the share of the last step",
            "replace(learner, kd_ratio=config.kd_ratio)",
            "learner",
            BY_HAND,
        ),
        Mutant("tokens of earlier steps are lost", "progress.tokens + step.tokens", "step.tokens", BY_HAND),
        Mutant(
            "seconds of earlier steps are lost",
            "seconds=progress.seconds + seconds",
            "seconds=seconds",
            f"{TRAIN}test_a_run_that_was_interrupted_goes_on_to_the_same_end",
        ),
        Mutant(
            "a checkpoint is ahead of its curve",
            "    metrics.sync()\n",
            "",
            f"{TRAIN}test_a_checkpoint_is_never_ahead_of_its_curve",
        ),
        Mutant(
            "weights that are no numbers are saved",
            "    require_finite_weights(model, progress.step)\n",
            "",
            f"{REFUSALS}test_weights_out_of_range_are_never_saved",
        ),
        Mutant(
            "a resumed run takes all its steps again",
            "islice(ahead, schedule.steps - progress.step)",
            "islice(ahead, schedule.steps)",
            f"{TRAIN}test_a_run_that_was_interrupted_goes_on_to_the_same_end",
        ),
        Mutant(
            "a resumed run begins the order anew",
            ", cursor=progress.cursor, end",
            ", end",
            f"{TRAIN}test_a_run_that_was_interrupted_goes_on_to_the_same_end",
        ),
        Mutant(
            "dropout depends on what the process did before",
            "    torch.manual_seed(config.seed)\n",
            "",
            "test_pipeline/test_train_validation.py::test_validation_changes_nothing_in_training",
        ),
        Mutant(
            "a finished run that lost checkpoints goes back",
            "begun.step if finished is None else max(begun.step, finished.step)",
            "begun.step",
            f"{REFUSALS}test_a_finished_run_goes_on_from_an_older_checkpoint_but_never_back",
        ),
        Mutant(
            "a finished run without checkpoints is trained anew",
            "if finished is not None and begun.step == 0:",
            "if False:",
            f"{REFUSALS}test_a_finished_run_without_a_checkpoint_is_not_trained_anew",
        ),
    ],
    "pipeline/training/recipe.py": [
        Mutant(
            "float16 trains",
            "if dtype == torch.float16:",
            "if False:",
            f"{TRAIN}test_float16_is_refused",
        ),
        Mutant(
            "rows are read for cross-entropy alone",
            "with_targets=config.kd_ratio > 0.0 and not data.online",
            "with_targets=not data.online",
            f"{REFUSALS}test_cross_entropy_alone_reads_no_teacher_rows",
        ),
        Mutant(
            "a student may know too few positions",
            "longest = check_positions(model.config, data.window, lambda: data.longest_read)\n",
            "longest = data.longest\n",
            f"{REFUSALS}test_a_student_with_too_few_positions_is_refused",
        ),
        Mutant(
            "rows that do not fit the loss train",
            "        _check_loss_fits(loss, data.store.plan.target)\n",
            "        pass\n",
            f"{REFUSALS}test_samples_that_the_store_does_not_hold_are_refused",
        ),
        Mutant(
            "a student may have another tokenizer",
            "        same = check_tokenizer(source, tokenizer)\n",
            "        same = True\n",
            f"{REFUSALS}test_a_student_with_another_tokenizer_is_refused",
        ),
        Mutant(
            "a tail policy is taken for a live teacher",
            "if loss.objective.tail is not None:",
            "if False:",
            "test_pipeline/test_train_online.py::test_a_tail_policy_is_for_stored_rows",
        ),
    ],
    "pipeline/training/data.py": [
        Mutant(
            "a teacher changes the order of a corpus",
            "order_digest=order_digest,",
            "order_digest=digest,",
            "test_pipeline/test_train_online.py::test_cross_entropy_alone_builds_no_teacher_and_sees_the_same_tokens",
        ),
        Mutant(
            "an online run may hold out something else",
            '        "heldout": vars(rule),\n',
            "",
            "test_pipeline/test_train_online.py::test_another_corpus_rendering_or_teacher_is_refused_and_named",
        ),
    ],
    "pipeline/training/estimate.py": [
        Mutant(
            "the time is that of one token",
            "seconds=seconds * tokens",
            "seconds=seconds",
            f"{TRAIN}test_a_dry_run_estimates_and_writes_nothing",
        ),
        Mutant(
            "a micro-batch passes for a token",
            "/ step.batches[0].tokens\n",
            "\n",
            f"{TRAIN}test_a_dry_run_estimates_and_writes_nothing",
        ),
    ],
    "pipeline/evaluate.py": [
        Mutant(
            "a sequence is lost where forwards are cut",
            "first, longest = index, 0",
            "first, longest = index + 1, 0",
            f"{EVALUATE}test_forwards_hold_every_sequence_once_and_as_many_as_fit",
        ),
        Mutant(
            "the longest sequence of a forward is forgotten",
            "max(longest, length) * (index + 1 - first)",
            "length * (index + 1 - first)",
            f"{EVALUATE}test_forwards_hold_every_sequence_once_and_as_many_as_fit",
        ),
        Mutant(
            "the interval is that of 90%",
            "[0.025, 0.975]",
            "[0.05, 0.95]",
            f"{EVALUATE}test_intervals_are_those_of_the_ratio_over_documents",
        ),
        Mutant(
            "all documents weigh the same",
            "sum_M[drawn].sum(1) / count_M[drawn].sum(1)",
            "(sum_M / count_M)[drawn].mean(1)",
            f"{EVALUATE}test_intervals_are_those_of_the_ratio_over_documents",
        ),
        Mutant(
            "positions are resampled",
            "np.unique(document_N, return_inverse=True)",
            "np.unique(np.arange(len(document_N)), return_inverse=True)",
            f"{EVALUATE}test_intervals_are_those_of_the_ratio_over_documents",
        ),
        Mutant(
            "a token is scored by itself",
            "np.flatnonzero(heldout.has_row) + 1",
            "np.flatnonzero(heldout.has_row)",
            f"{EVALUATE}test_scores_are_those_of_the_naive_reference",
        ),
        Mutant(
            "KL has the other direction",
            "teacher_p_CV * (teacher_CV - logprob_CV)",
            "logprob_CV.exp() * (logprob_CV - teacher_CV)",
            f"{EVALUATE}test_scores_are_those_of_the_naive_reference",
        ),
        Mutant(
            "bins are closed on the left",
            "np.ceil(confidence_N * BINS).astype(np.int64) - 1",
            "np.floor(confidence_N * BINS).astype(np.int64)",
            f"{EVALUATE}test_calibration_bins_are_closed_on_the_right",
        ),
        Mutant(
            "another teacher is taken",
            "if stored.get(name) != hashes.get(name):",
            "if False:",
            f"{EVALUATE}test_another_teacher_is_refused",
        ),
        Mutant(
            "students may have another tokenizer",
            "        compare_tokenizers(files.directory, tokenizer, where=str(files.directory))\n",
            "        pass\n",
            f"{EVALUATE}test_a_student_with_broken_files_is_named",
        ),
        Mutant(
            "a document is cut where tokens end",
            "end = int(earlier[-1]) if len(earlier)",
            "end = max(fits, 1) if len(earlier)",
            f"{EVALUATE}test_fewer_tokens_are_whole_documents",
        ),
    ],
    "pipeline/config/base.py": [
        Mutant(
            "unknown keys are ignored",
            'extra="forbid"',
            'extra="ignore"',
            f"{CONFIG}test_extract_problems_name_line_key_and_remedy",
        ),
        Mutant("numbers may be infinite", "allow_inf_nan=False", "allow_inf_nan=True", f"{CONFIG}test_train_problems"),
    ],
    "pipeline/config/train.py": [
        Mutant(
            "a warm-up may be longer than the run",
            "if self.steps is not None and self.schedule.warmup_steps > self.steps:",
            "if False:",
            f"{CONFIG}test_train_problems",
        ),
        Mutant(
            "a run may have steps and epochs",
            "if (self.steps is None) == (self.epochs is None):",
            "if self.steps is None and self.epochs is None:",
            f"{CONFIG}test_train_problems",
        ),
        Mutant(
            "a run may have a store and a live teacher",
            "if (self.store is None) == (self.teacher_model is None):",
            "if self.store is None and self.teacher_model is None:",
            "test_pipeline/test_train_online.py::test_a_store_and_a_live_teacher_do_not_mix",
        ),
        Mutant(
            "the loss is not looked at",
            "        check_loss(self.loss)\n",
            "",
            f"{CONFIG}test_loss_problems",
        ),
    ],
    "pipeline/config/extract.py": [
        Mutant(
            "windows may overlap whole",
            "if self.overlap >= self.window:",
            "if self.overlap > self.window:",
            f"{CONFIG}test_extract_problems_name_line_key_and_remedy",
        ),
        Mutant(
            "targets are not checked",
            "        self.spec().check()\n",
            "",
            f"{CONFIG}test_extract_problems_name_line_key_and_remedy",
        ),
        Mutant(
            "a source may lack its path",
            "if (self.path is not None) != kind.path:",
            "if False:",
            f"{CONFIG}test_extract_problems_name_line_key_and_remedy",
        ),
        Mutant(
            "everything may be held out",
            "Field(ge=0.0, lt=1.0, strict=True)",
            "Field(ge=0.0, le=1.0, strict=True)",
            f"{CONFIG}test_extract_problems_name_line_key_and_remedy",
        ),
    ],
    "pipeline/terminal/errors.py": [
        Mutant(
            "what cannot go on says that it can",
            "RESUMABLE if resumable else INTERRUPTED",
            "RESUMABLE",
            "test_pipeline/test_errors.py::test_interruption_of_a_command_that_cannot_go_on",
        ),
    ],
    "pipeline/terminal/application.py": [
        Mutant(
            "training and conversion cannot go on",
            '"extract", "train", "convert", "demo"',
            '"extract", "demo"',
            "test_pipeline/test_errors.py::test_signals_end_without_a_traceback",
        ),
    ],
    "pipeline/commands/models.py": [
        Mutant(
            "another teacher that is named is not asked",
            "name_models(runs), teacher, max_tokens",
            "name_models(runs), None, max_tokens",
            OPTIONS,
        ),
        Mutant(
            "all tokens are read",
            "max_tokens=max_tokens)\n    show_eval",
            "max_tokens=None)\n    show_eval",
            OPTIONS,
        ),
        Mutant("a chat is plain text", "chat=chat, ", "", OPTIONS),
    ],
    "pipeline/commands/phases.py": [
        Mutant(
            "a plan ignores what is overridden",
            "show_estimate(estimate(load_extract(config_path, overrides), tokens",
            "show_estimate(estimate(load_extract(config_path), tokens",
            "test_pipeline/test_cli.py::test_plan_tells_what_it_will_take",
        ),
        Mutant(
            "training is never quiet",
            "progress.show_train(train.train(config), quiet=session.quiet,",
            "progress.show_train(train.train(config), quiet=False,",
            OPTIONS,
        ),
    ],
    "pipeline/demo/run.py": [
        Mutant(
            "the demo removes what is not its own",
            "if link.exists() and not link.is_symlink():",
            "if False:",
            "test_pipeline/test_demo.py::test_a_directory_in_place_of_the_link_is_kept",
        ),
    ],
}
