"""What to write in place of keys that other systems have, and which keys stand for things that this version lacks.

Keys are matched below any section, spelled alike whether with `_` or `-`; a key with a dot is matched with its section.
A test holds that each hint names keys that exist.
"""

from __future__ import annotations

_RESUME = "leave it out: the same command again goes on where it stopped"
_COMPLETION = "set field: it names the completion, and prompt_field the prompt"
TRAIN = {  # keys of training recipes elsewhere: the sentence that stands in the place of the fix
    "step_scheduler": "set steps or epochs, tokens_per_step, checkpoint.every and validation.every",
    "resume_from_checkpoint": _RESUME,
    "resume": _RESUME,
    "max_steps": "set steps",
    "num_train_epochs": "set epochs",
    "num_epochs": "set epochs",
    "rng": "set seed",
    "optimizer.kind": "leave it out: AdamW is the only optimizer",
    "optimizer.name": "leave it out: AdamW is the only optimizer",
    "optimizer._target_": "leave it out: AdamW is the only optimizer",
    "optim": "set optimizer; AdamW is the only one",
    "learning_rate": "set optimizer.lr",
    "weight_decay": "set optimizer.weight_decay",
    "adam_beta1": "set optimizer.betas",
    "adam_beta2": "set optimizer.betas",
    "adam_epsilon": "set optimizer.eps",
    "lr_scheduler": "set schedule.kind",
    "lr_scheduler_type": "set schedule.kind",
    "lr_decay_style": "set schedule.kind",
    "min_lr": "set schedule.min_factor, a share of optimizer.lr",
    "warmup_ratio": "set schedule.warmup_steps",
    "max_grad_norm": "set clip_norm",
    "global_batch_size": "set tokens_per_step: a step is counted in tokens",
    "local_batch_size": "set tokens_per_batch: a micro-batch is counted in tokens",
    "batch_size": "set tokens_per_step, and tokens_per_batch for the memory: both are counted in tokens",
    "micro_batch_size": "set tokens_per_batch: a micro-batch is counted in tokens",
    "per_device_train_batch_size": "set tokens_per_batch: a micro-batch is counted in tokens",
    "gradient_accumulation_steps": "set tokens_per_step; it is cut into micro-batches of tokens_per_batch",
    "output_dir": "set run",
    "save_steps": "set checkpoint.every",
    "ckpt_every_steps": "set checkpoint.every",
    "save_total_limit": "set checkpoint.keep",
    "eval_steps": "set validation.every",
    "val_every_steps": "set validation.every",
    "model": "set student",
    "base_model": "set student.path",
    "student_model": "set student.path",
    "model_name_or_path": "set student.path",
    "pretrained_model_name_or_path": "set student.path",
    "teacher": "set store, or teacher_model for a live teacher",
    "teacher_model_name_or_path": "set store, or teacher_model.path for a live teacher",
    "loss_fn": "set loss and kd_ratio",
    "kd_loss_fn": "set loss and kd_ratio",
    "alpha": "set kd_ratio",
    "temperature": "set loss.temperature",
    "kd_temperature": "set loss.temperature",
    "dataset": "set store, or corpus beside teacher_model",
    "datasets": "set store, or corpus beside teacher_model",
    "sequence_len": "set rendering.window where the corpus is read",
    "max_seq_length": "set rendering.window where the corpus is read",
    "max_length": "set rendering.window where the corpus is read",
    "bf16": "set dtype: bfloat16",
    "fp16": "set dtype: bfloat16; float16 has too little range for gradients",
    "torch_dtype": "set dtype",
    "attn_implementation": "set attention",
    "packed_sequence": "leave it out: sequences are always packed",
    "packing": "leave it out: sequences are always packed",
    "dp_size": "set distributed",
    "tp_size": "set distributed.tp",
    "completion_field": _COMPLETION,
}
EXTRACT = {
    "resume_from_checkpoint": _RESUME,
    "resume": _RESUME,
    "completion_field": _COMPLETION,
    "model": "set teacher",
    "output_dir": "set store",
    "output_path": "set store",
    "dataset": "set corpus",
    "datasets": "set corpus",
    "max_seq_length": "set rendering.window",
    "max_length": "set rendering.window",
    "sequence_len": "set rendering.window",
    "top_k": "set target.k",
    "top_p": "set target.p",
    "temperature": "set target.temperatures",
    "torch_dtype": "set teacher.dtype",
    "attn_implementation": "set teacher.attention",
}
_TRACKERS = "metrics are in RUN/metrics.jsonl, and RUN/report.html draws them; experiment trackers"
_ADAPTERS = "all weights of the student are trained; adapters such as LoRA"
_QUANTISED = "models are computed in the precision of dtype; quantised weights"
_CHAT = "text is read as it is, or as prompt_field and field; chat templates and lists of messages"
ABSENT = {  # in both phases: what there is, and what this version does not have
    **dict.fromkeys(("wandb", "wandb_project", "mlflow", "comet", "tensorboard", "trackio", "report_to"), _TRACKERS),
    **dict.fromkeys(("trackers", "logging", "logging_steps"), _TRACKERS),
    **dict.fromkeys(("lora", "peft", "adapter", "lora_r", "lora_alpha", "qlora"), _ADAPTERS),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_config", "bnb_config"), _QUANTISED),
    **dict.fromkeys(("template", "chat_template", "messages", "conversation"), _CHAT),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config"),
        "several processes share a model by distributed.tp; data parallelism and DeepSpeed",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "torch_compile", "compile"),
        "tokens_per_batch and chunk_size bound the memory; recomputed activations and compiled models",
    ),
    "trust_remote_code": "models run in the code of transformers alone; models that bring their own",
    **dict.fromkeys(("push_to_hub", "hub_model_id"), "RUN/model is a plain Hugging Face directory; uploads"),
}


def hint(key: str, section: str, *, training: bool) -> str | None:
    """Return what to do about a key of other systems; None: nothing is known of it.

    Args:
        key: unknown here.
        section: that it stands in, with dots; empty: at the top.
        training: whether the configuration is that of a training; else of an extraction.
    """
    table = TRAIN if training else EXTRACT
    plain = key.replace("-", "_").lower()
    known = table.get(f"{section}.{plain}", table.get(plain))
    if known is None and plain in ABSENT:
        return f"{ABSENT[plain]} are not in this version: leave {key!r} out"
    return known
