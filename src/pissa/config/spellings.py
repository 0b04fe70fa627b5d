"""What other tools call our settings: axolotl, LLaMA-Factory, TRL, transformers, peft, torchtune,
unsloth, mlx-lm.

Tables only; `pissa.config.translation` reads them. What means the same is understood; what would
silently mean something else is refused, with what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES = {
    "base_model": "model", "model_name_or_path": "model", "model_name": "model", "model_revision": "revision",
    "revision_of_model": "revision", "adapter": "method", "finetuning_type": "method",
    "fine_tune_type": "method", "train_type": "method",
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "lora_target_modules": "targets", "lora_target": "targets",
    "lora_modules_to_save": "modules_to_save", "additional_target": "modules_to_save",
    "dataset": "data", "dataset_path": "data", "dataset_name": "data", "data_path": "data", "train_file": "data",
    "train_data": "data", "dataset_train_split": "data_split", "eval_dataset": "eval_data",
    "validation_file": "eval_data", "val_dataset": "eval_data", "dataset_test_split": "eval_split",
    "val_set_size": "eval_size", "val_size": "eval_size", "split_dataset_ratio": "eval_size",
    "max_samples": "data_limit", "max_train_samples": "data_limit", "max_eval_samples": "eval_limit",
    "output_dir": "output", "adapter_path": "output", "overwrite_output_dir": "force",
    "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler", "clip_grad_norm": "max_grad_norm",
    "global_batch_size": "batch_size",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_train_steps": "max_steps", "iters": "max_steps",
    "bnb_4bit_quant_type": "quant", "quantization_type": "quant", "bnb_4bit_use_double_quant": "double_quant",
    "double_quantization": "double_quant", "use_bnb_nested_quant": "double_quant",
    "sequence_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "cutoff_len": "max_length", "model_max_length": "max_length", "sample_packing": "packing",
    "neat_packing": "packing", "torch_dtype": "dtype", "attn_impl": "attn_implementation",
    "use_liger_kernel": "liger", "enable_liger_kernel": "liger", "use_liger": "liger",
    "activation_checkpointing": "gradient_checkpointing", "grad_checkpoint": "gradient_checkpointing",
    "enable_activation_checkpointing": "gradient_checkpointing",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "early_stopping_patience": "early_stopping", "early_stopping_steps": "early_stopping",
    "steps_per_eval": "eval_steps", "save_every": "save_steps", "steps_per_report": "logging_steps",
    "random_state": "seed", "random_seed": "seed",
}  # fmt: skip
"""Another name for the same thing."""

VALUES: dict[str, dict[str, Any]] = {
    "dtype": {
        "bf16": "bfloat16",
        "fp16": "float16",
        "half": "float16",
        "fp32": "float32",
        "none": "auto",
    }
    | {f"torch.{name}": name for name in ("bfloat16", "float16", "float32")},
    "lr_scheduler": {"constant_with_warmup": "constant"},
    "max_steps": {"-1": 0},
    "template": {"default": "chat"},
    "attn_implementation": {"flash_attn": "flash_attention_2", "none": "auto"},
    "report_to": {"[]": "none"},
    **{key: {"null": None, "none": None} for key in ("quant", "eval_data", "old_data", "revision")},
}
"""Another spelling of a value, by our key."""

ACCUMULATION, INIT = "gradient_accumulation_steps", "init_lora_weights"
EVERY_STEPS, PER_DEVICE = "eval_strategy: steps", "per_device_train_batch_size"
RENAMED = {
    "grad_accumulation_steps": ACCUMULATION, "peft_init_lora_weights": INIT, "init_weights": INIT,
}  # fmt: skip
"""Keys that are no settings of ours, and follow together with others once all layers are there."""

IGNORED = frozenset(
    {
        "adapter_name", "cache_dir", "data_seed", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_prefetch_factor", "dataset_num_proc", "dataset_prepared_path", "ddp_find_unused_parameters",
        "ddp_timeout", "debug", "disable_tqdm", "eval_batch_size", "eval_sample_packing", "eval_table_size",
        "gradient_checkpointing_kwargs", "include_num_input_tokens_seen", "is_llama_derived_model", "log_level",
        "logging_dir", "logging_first_step", "model_type", "num_proc", "overwrite_cache", "pad_to_sequence_len",
        "per_device_eval_batch_size", "plot_loss", "preprocessing_num_workers", "run_name", "save_only_model",
        "save_safetensors", "shuffle_merged_datasets", "strict", "tf32", "tokenizer_type", "use_fast_tokenizer",
        "wandb_log_model", "wandb_name", "wandb_run_id", "wandb_watch", "xpu_backend",
    }
)  # fmt: skip
"""Speed, memory and names of other tools: left out with a warning."""

OFF: dict[str, dict[str, Any]] = {"false": {}, "none": {}, "null": {}, "": {}, "0": {}}
ON: dict[str, dict[str, Any]] = {"true": {}}
Meaning = tuple[Mapping[str, dict[str, Any]], str]


def _absent(advice: str, *keys: str) -> dict[str, Meaning]:
    """Keys that have no meaning here unless they are off."""
    return dict.fromkeys(keys, (OFF, advice))


_ANSWERS = "true: only responses carry loss; rows with a `text` column carry it everywhere"
_ADAMW: Meaning = (
    {"adamw_torch": {}, "adamw_torch_fused": {}, "adamw_hf": {}, "adamw": {}},
    "adamw_torch: AdamW, in float32",
)
_STEPS = "steps, and eval_steps (or save_steps): a number of optimiser steps"
_FLASH = {
    "true": {"attn_implementation": "flash_attention_2"}, "fa2": {"attn_implementation": "flash_attention_2"},
    "fa3": {"attn_implementation": "flash_attention_3"}, "sdpa": {"attn_implementation": "sdpa"},
    "disabled": {"attn_implementation": "eager"}, "auto": {"attn_implementation": "auto"},
}  # fmt: skip

MEANINGS: dict[str, Meaning] = {
    "adam_beta1": ({"0.9": {}}, "0.9"),
    "adam_beta2": ({"0.999": {}}, "0.999"),
    "adam_epsilon": ({"1e-08": {}, "1e-8": {}}, "1e-8"),
    "assistant_only_loss": (ON, _ANSWERS),
    "bfloat16": (OFF | {"true": {"dtype": "bfloat16"}}, "true or false"),
    "bias": (OFF, "none: biases do not train"),
    "chat_template": (OFF | {"tokenizer_default": {"template": "chat"}}, "template: chat, alpaca, plain or none"),
    "completion_only_loss": (ON | {"none": {}}, _ANSWERS),
    "disable_gradient_checkpointing": (OFF | {"true": {"gradient_checkpointing": False}}, "true or false"),
    "do_eval": (OFF | ON, "true or false"),
    "do_train": (ON, "true: `pissa train` trains"),
    "eager_attention": (OFF | {"true": {"attn_implementation": "eager"}}, "true or false"),
    "eval_strategy": (OFF | {"no": {}, "steps": {EVERY_STEPS: True}}, _STEPS),
    "evaluation_strategy": (OFF | {"no": {}, "steps": {EVERY_STEPS: True}}, _STEPS),
    "flash_attention": (OFF | _FLASH, "true or false"),
    "flash_attn": (OFF | _FLASH, "auto, sdpa, fa2, fa3 or disabled"),
    "float16": (OFF | {"true": {"dtype": "float16"}}, "true or false"),
    "full_finetune": (OFF | {"true": {"method": "full"}}, "true or false"),
    "full_finetuning": (OFF | {"true": {"method": "full"}}, "true or false"),
    "label_smoothing_factor": (OFF | {"0.0": {}}, "0"),
    "logging_strategy": ({"steps": {}}, "steps, and logging_steps"),
    "lora_target_linear": (OFF | {"true": {"targets": "all-linear"}}, "true, or targets: [names]"),
    "mask_prompt": (ON, _ANSWERS),
    "metric_for_best_model": (OFF | {"loss": {}, "eval_loss": {}}, "eval_loss"),
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "pissa_convert": (OFF | ON, "true: RUN/adapter is a plain LoRA at every checkpoint"),
    "pissa_init": (OFF | {"true": {INIT: "pissa"}}, "true or false"),
    "peft_type": ({"lora": {}}, "LORA, and method: one of those listed by `pissa methods`"),
    "pure_bf16": (OFF | {"true": {"dtype": "bfloat16"}}, "true or false"),
    "quantization_bit": (
        OFF | {"4": {"load_in_4bit": True}, "8": {"load_in_8bit": True}, "16": {}}, "4, 8 or nothing, or quant: nf4"
    ),
    "quantization_method": ({"bitsandbytes": {}, "bnb": {}, "none": {}}, "bnb, or quant: nf4, fp4 or int8"),
    "save_strategy": (OFF | {"no": {"save_steps": 0}, "false": {"save_steps": 0}, "steps": {}}, _STEPS),
    "sdp_attention": (OFF | {"true": {"attn_implementation": "sdpa"}}, "true or false"),
    "stage": ({"sft": {}}, "sft; DPO, KTO and GRPO are in docs/preference.md"),
    "task_type": ({"causal_lm": {"task": "language"}, "seq_cls": {"task": "classification"}}, "CAUSAL_LM or SEQ_CLS"),
    "train": (ON, "true: `pissa train` trains"),
    "train_on_inputs": (OFF, "false: only responses carry loss; rows with a `text` column carry it everywhere"),
    "train_on_prompt": (OFF, "false: only responses carry loss; rows with a `text` column carry it everywhere"),
    "train_on_responses_only": (ON, _ANSWERS),
    "use_flash_attention_2": (OFF | _FLASH, "true or false"),
    "use_peft": (ON | {"false": {"method": "full"}}, "true or false"),
    **_absent("nothing: RUN/adapter of a finished run is what `hf upload` takes",
              "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"),
    **_absent("nothing: `pissa train CONFIG --resume` goes on from the newest checkpoint in `output`",
              "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    **_absent("nothing: `accelerate launch -m pissa train CONFIG`, see docs/distributed.md",
              "deepspeed", "fsdp", "fsdp_config"),
    **_absent("nothing: report_to: wandb, and WANDB_PROJECT in the environment",
              "wandb_project", "wandb_entity", "use_wandb"),
    **_absent("a number of optimiser steps: eval_steps and save_steps", "evals_per_epoch", "saves_per_epoch"),
    **_absent("false: what a run saves is its last step", "load_best_model_at_end", "greater_is_better"),
    **_absent("nothing: the tokenizer is the model's own", "tokenizer_name_or_path", "tokenizer_name", "tokenizer",
              "special_tokens"),
    **_absent("nothing: rows with other columns are named by fields: {text: your_column}", "dataset_text_field"),
    **_absent("nothing: data: id:subset", "dataset_config", "dataset_config_name", "subset"),
    **_absent("nothing: data: is the path itself", "dataset_dir"),
    **_absent("false; the same scale is alpha: your alpha times the root of the rank", "use_rslora", "peft_use_rslora"),
    **_absent("false: bf16: true computes in 16 bits, without loss scaling", "fp16"),
    **_absent("nothing: it computes in `dtype`, or in bfloat16 with bf16: true", "bnb_4bit_compute_dtype"),
    **_absent("false: `sdpa` or flash_attention_2 as attn_implementation", "xformers_attention"),
    **_absent("nothing: DPO, KTO and GRPO are in docs/preference.md", "rl"),
    **_absent("it in a file; `pissa train NAME` takes a recipe as it is, and flags win over it", "extends"),
    **_absent("nothing: model: names the residual's folder, and the start lies beside it", "adapter_name_or_path",
              "lora_model_dir"),
    **_absent("nothing: it is not there", "do_predict", "group_by_length", "loraplus_lr_ratio",
              "neftune_noise_alpha", "peft_use_dora", "torch_compile", "use_dora", "use_unsloth"),
}  # fmt: skip
"""A key of another tool to its values in lower case, what those set here, and what is expected of any other value."""
