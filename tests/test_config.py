"""Claims about settings: every mistake in one report, other tools' spellings, flags over YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pissa.config import ALIASES, KEYS, TrainSettings, load_settings
from pissa.config.spellings import EVERY_STEPS, INIT, MEANINGS
from pissa.errors import ConfigError

NEEDED = {"model": "base", "data": "rows.jsonl", "output": "out"}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(path: Path | None, overrides: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_are_the_authors_hyper_parameters() -> None:
    # github.com/MuLabPKU/PiSSA, scripts/metamath_llama2_7b/run_pissa.sh
    s = load_settings(None, NEEDED)
    assert (s.learning_rate, s.lr_scheduler, s.warmup_ratio, s.weight_decay) == (
        2e-5,
        "cosine",
        0.03,
        0,
    )
    assert (s.batch_size, s.epochs, s.max_length, s.dropout, s.method) == (128, 1, 512, 0, "pissa")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: base\nmodel: other\nrank: 0\nalpha: -1\nlearning_rate: -2e-5\nlern_rate: 1\nbase: keepp\n"
        "lora_dropout: 2\ndropout: 0\nmicro_batch_size: 5\nmax_length: yes\nfields: {lable: x}\neval_steps: 3\n",
    )
    found = "\n".join(mistakes(path, {"epochs": "many"}))
    for claim in (
        "model: got it in line 1 and again in line 2",
        "rank: got 0, expected greater than or equal to 1",
        "alpha: got -1, expected greater than 0",
        "learning_rate: got '-2e-5', expected greater than 0",
        "lern_rate: got an unknown key",
        "Did you mean 'learning_rate'?",
        "base: got 'keepp', expected 'keep' or 'residual' Did you mean 'keep'?",
        "dropout: got it beside lora_dropout",
        "micro_batch_size: got 5, expected a divisor of batch_size, which is 128",
        "max_length: got True, expected a number",
        "Did you mean 'label'?",
        "eval_steps: got 3, expected eval_data or eval_size beside it",
        "epochs: got 'many', expected a valid number",
        "data: got nothing",
        "output: got nothing",
    ):
        assert claim in found


def test_a_rate_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, "learning_rate: 2e-5\n"), NEEDED).learning_rate == 2e-5


def test_flags_win_over_yaml_under_any_spelling(tmp_path: Path) -> None:
    path = written(tmp_path, "lora_r: 8\nnum_train_epochs: 3\n")
    settings = load_settings(path, {**NEEDED, "rank": "4"})
    assert (settings.rank, settings.alpha, settings.epochs) == (4, 4.0, 3.0)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_stands_for_a_key(alias: str) -> None:
    assert ALIASES[alias] in KEYS
    assert alias not in KEYS


def test_accumulation_steps_make_the_batch() -> None:
    settings = load_settings(
        None, NEEDED | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    )
    assert (settings.batch_size, settings.micro_batch_size) == (32, 4)
    assert (
        "beside micro_batch_size" in mistakes(None, NEEDED | {"gradient_accumulation_steps": 8})[0]
    )
    assert (
        load_settings(
            None, NEEDED | {"batch_size": 12, "per_device_train_batch_size": 3}
        ).micro_batch_size
        == 3
    )
    both = {"batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": 8}
    assert "expected batch_size / micro_batch_size, 16 / 4" in mistakes(None, NEEDED | both)[0]


@pytest.mark.parametrize(("batch", "micro"), [(128, 8), (12, 6), (7, 7), (13, 1), (1, 1)])
def test_micro_batch_divides_the_batch_by_default(batch: int, micro: int) -> None:
    assert load_settings(None, NEEDED | {"batch_size": batch}).micro_batch_size == micro


def test_targets_are_a_list_a_name_or_an_expression() -> None:
    def targets(value: object) -> object:
        return load_settings(None, NEEDED | {"lora_target": value}).targets

    assert targets("q_proj, v_proj") == targets(["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    assert targets("all") == "all-linear"
    assert targets(r".*\.\d{1,2}\.q_proj") == r".*\.\d{1,2}\.q_proj"


def test_eval_size_and_eval_data_exclude_each_other() -> None:
    assert mistakes(None, NEEDED | {"eval_data": "x", "val_set_size": 0.1})[0].startswith(
        "eval_size: got 0.1"
    )
    assert mistakes(None, NEEDED | {"eval_size": 1.5})[0].endswith(
        "expected a share below 1 or a whole number of rows"
    )


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_settings(written(tmp_path, text), {})


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        load_settings(tmp_path / "absent.yaml", {})


def test_python_tags_in_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        load_settings(written(tmp_path, "model: !!python/object/apply:os.getcwd []\n"), {})


def test_every_key_has_a_help_text() -> None:
    assert all(field.description for field in TrainSettings.model_fields.values())


def test_settings_survive_their_own_yaml(tmp_path: Path) -> None:
    import yaml

    settings = load_settings(None, NEEDED | {"fields": {"label": "Quality"}, "eval_size": 0.1})
    path = written(tmp_path, yaml.safe_dump(settings.model_dump(mode="json")))
    assert load_settings(path, {}) == settings


def folder(tmp_path: Path, **files: str) -> Path:
    """YAML files side by side; the path of `run.yaml`."""
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "run.yaml"


def test_a_file_wins_over_what_it_extends_and_flags_over_both(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        run="extends: middle.yaml\nlora_r: 8\n",
        middle="extends: bottom.yaml\nseed: 1\nlr: 1.0e-4\nrank: 4\n",
        bottom="seed: 2\nlearning_rate: 2.0e-4\nepochs: 3\n",
    )
    settings = load_settings(path, NEEDED | {"num_epochs": 5})
    assert (settings.rank, settings.learning_rate, settings.seed, settings.epochs) == (
        8,
        1e-4,
        1,
        5,
    )


def test_a_recipes_name_is_a_base_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(folder(tmp_path, run="extends: math-lora\nrank: 3\n"), {}).method == "lora"
    assert load_settings(Path("math-lora"), {}).rank == 128
    (tmp_path / "math-lora").write_text("method: olora\nrank: 2\n")
    assert load_settings(tmp_path / "run.yaml", NEEDED).method == "olora"
    assert load_settings(Path("math-lora"), NEEDED).rank == 2


@pytest.mark.parametrize(
    ("files", "claim"),
    [
        ({"run": "extends: run.yaml"}, "run.yaml extends run.yaml: got a circle"),
        (
            {"run": "extends: a.yaml", "a": "extends: run.yaml"},
            "run.yaml extends a.yaml extends run.yaml: got a circle",
        ),
        ({"run": "extends: absent.yaml"}, "neither a file in .* nor a recipe"),
        ({"run": "extends: math-pisa"}, "Did you mean 'math-pissa'"),
        ({"run": "extends: ../outside.yaml"}, "expected a file in .* or below it"),
        ({"run": "extends: /etc/hostname"}, "expected a file in .* or below it"),
        ({"run": "extends: link.yaml"}, "expected a file in .* or below it"),
        ({"run": "extends: [a.yaml]", "a": "rank: 1"}, "expected the path of a YAML file"),
        ({"run": "extends: a.yaml", "a": "- rank"}, "a.yaml: got list"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(
    tmp_path: Path, files: dict[str, str], claim: str
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "outside.yaml").write_text("rank: 1\n")
    (inner / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(ConfigError, match=claim):
        load_settings(folder(inner, **files), NEEDED)


def test_a_mistake_in_a_base_names_its_file(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        run="extends: a.yaml\nrank: 0\n",
        a="lern_rate: 1\nepochs: -1\nseed: 1\nseed: 2\nrank: -5\n",
    )
    found = mistakes(path, NEEDED)
    assert {line.split(":")[0] for line in found if line.endswith("(in a.yaml)")} == {
        "seed",
        "lern_rate",
        "epochs",
    }
    assert "rank: got 0, expected greater than or equal to 1" in found


def test_an_upper_layer_takes_back_what_contradicts_it(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        run="max_steps: 9\nbatch_size: 64\neval_size: 5\nadapter: qlora\npeft_init_lora_weights: pissa\n",
    )
    below = load_settings(path, NEEDED)
    assert (below.max_steps, below.batch_size, below.method, below.quant) == (9, 64, "pissa", "nf4")
    flags = {
        "epochs": "2",
        "gradient_accumulation_steps": 3,
        "micro_batch_size": 2,
        "eval_data": "x",
        "method": "lora",
    }
    above = load_settings(path, NEEDED | flags)
    assert (above.max_steps, above.epochs, above.batch_size, above.eval_size) == (0, 2, 6, 0)
    assert (above.method, above.quant) == ("lora", None)


AXOLOTL = """
base_model: base
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets: [{path: openai/gsm8k, name: main, split: train, type: alpaca}]
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: true
fp16:
gradient_checkpointing: true
early_stopping_patience: 3
resume_from_checkpoint:
flash_attention: true
warmup_steps: 0
save_strategy: steps
deepspeed:
fsdp:
special_tokens:
wandb_project:
output_dir: out
"""
LLAMA_FACTORY = """
model_name_or_path: base
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
additional_target: embed_tokens
pissa_init: true
pissa_iter: 16
pissa_convert: true
quantization_bit: 4
double_quantization: true
dataset: rows.jsonl
cutoff_len: 1024
max_samples: 1000
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_train_epochs: 3.0
lr_scheduler_type: constant_with_warmup
warmup_ratio: 0.1
pure_bf16: true
flash_attn: sdpa
enable_liger_kernel: true
disable_gradient_checkpointing: true
neat_packing: true
packing: true
eval_strategy: steps
eval_steps: 500
val_size: 0.1
output_dir: out
"""
TRL = """
model_name_or_path: base
model_revision: abc
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: openai/gsm8k:main
dataset_test_split: test
use_peft: false
max_length: 256
completion_only_loss: true
optim: adamw_torch_fused
max_steps: -1
eval_strategy: "no"
save_strategy: "no"
push_to_hub: false
report_to: none
max_grad_norm: 0.5
output_dir: out
"""


def test_an_axolotl_config_is_understood(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, AXOLOTL), {}) == load_settings(
        None,
        {
            "model": "base", "method": "qlora", "quant": "nf4", "rank": 32, "alpha": 16, "dropout": 0.05,
            "targets": "all-linear", "data": "openai/gsm8k:main", "data_split": "train", "template": "alpaca",
            "eval_size": 0.05, "max_length": 2048, "packing": True, "micro_batch_size": 2, "batch_size": 8,
            "epochs": 4, "lr_scheduler": "cosine", "learning_rate": 2e-4, "bf16": True,
            "gradient_checkpointing": True, "early_stopping": 3, "attn_implementation": "flash_attention_2",
            "warmup_ratio": 0, "output": "out",
        },
    )  # fmt: skip


def test_a_llama_factory_config_is_understood(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, LLAMA_FACTORY), {}) == load_settings(
        None,
        {
            "model": "base", "trust_remote_code": True, "method": "pissa", "quant": "nf4", "double_quant": True,
            "targets": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"], "data": "rows.jsonl",
            "max_length": 1024, "data_limit": 1000, "force": True, "micro_batch_size": 1, "batch_size": 8, "epochs": 3,
            "lr_scheduler": "constant", "warmup_ratio": 0.1, "dtype": "bfloat16", "attn_implementation": "sdpa",
            "liger": True, "gradient_checkpointing": False, "packing": True, "eval_steps": 500, "eval_size": 0.1,
            "output": "out",
        },
    )  # fmt: skip


def test_a_trl_config_is_understood(tmp_path: Path) -> None:
    assert load_settings(written(tmp_path, TRL), {}) == load_settings(
        None,
        {
            "model": "base", "revision": "abc", "dtype": "bfloat16", "attn_implementation": "flash_attention_2",
            "data": "openai/gsm8k:main", "eval_split": "test", "method": "full", "max_length": 256, "save_steps": 0,
            "max_grad_norm": 0.5, "output": "out",
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("resume_from_checkpoint", True, "--resume"),
        ("push_to_hub", "true", "hf upload"),
        ("warmup_steps", 100, "warmup_ratio"),
        ("datasets", [{"path": "a"}, {"path": "b"}], "got 2 entries, expected one entry"),
        (
            "datasets",
            [{"path": "a", "type": "sharegpt"}],
            "got type 'sharegpt', expected data: PATH",
        ),
        ("datasets", [{"path": "a", "shards": 2}], "got shards, expected data: PATH"),
        ("optim", "adamw_bnb_8bit", "AdamW, in float32"),
        ("fp16", True, "bf16: true"),
        ("train_on_inputs", True, "only responses carry loss"),
        ("assistant_only_loss", False, "only responses carry loss"),
        ("eval_strategy", "epoch", "eval_steps"),
        ("eval_strategy", "steps", "expected eval_steps beside it"),
        ("load_best_model_at_end", True, "last step"),
        ("use_rslora", True, "root of the rank"),
        ("deepspeed", "ds.json", "docs/distributed.md"),
        ("wandb_project", "mine", "WANDB_PROJECT"),
        ("stage", "dpo", "docs/preference.md"),
        ("init_lora_weights", "eva", "pissa methods"),
        ("flash_attention", "yes please", "true or false"),
        ("do_train", False, "true"),
        ("extends", "math-pissa", "in a file"),
        ("per_device_train_batch_size", 4, "expected batch_size"),
        ("adapter_name_or_path", "pissa_init", "the residual's folder"),
    ],
)
def test_what_would_mean_something_else_is_refused_with_advice(
    key: str, value: object, advice: str
) -> None:
    (line,) = mistakes(None, NEEDED | {key: value})
    assert line.startswith(f"{key}: got") and advice in line


@pytest.mark.parametrize(
    ("init", "method", "quant"),
    [
        ("pissa", "lora", None),
        ("pissa_niter_16", "qlora", "nf4"),
        ("olora", "lora", None),
        ("pissa", "qpissa", None),
    ],
)
def test_pefts_init_names_the_method(init: str, method: str, quant: str | None) -> None:
    settings = load_settings(None, NEEDED | {"adapter": method, "init_lora_weights": init})
    expected = "qpissa" if method == "qpissa" else init.split("_")[0]
    assert (settings.method, settings.quant) == (expected, quant)
    assert (
        load_settings(None, NEEDED | {"adapter": "qlora", "init_lora_weights": "true"}).method
        == "qlora"
    )
    assert (
        "expected one of the two"
        in mistakes(None, NEEDED | {"method": "milora", "init_lora_weights": "pissa"})[0]
    )


def test_columns_are_named_on_the_command_line_too() -> None:
    assert load_settings(None, NEEDED | {"fields": "{question: '#1 String'}"}).fields == {
        "question": "#1 String"
    }
    assert mistakes(None, NEEDED | {"fields": "{question: "})[0].startswith(
        "fields: got '{question: '"
    )


def test_a_data_set_entry_is_a_path_with_its_columns() -> None:
    entry = {
        "path": "json",
        "data_files": "rows.jsonl",
        "type": "chat_template",
        "field_messages": "talk",
    }
    settings = load_settings(
        None, {"model": "base", "output": "out", "datasets": [entry], "test_datasets": "eval.jsonl"}
    )
    assert (settings.data, settings.template, settings.eval_data) == (
        "rows.jsonl",
        "chat",
        "eval.jsonl",
    )
    assert settings.fields == {"messages": "talk"}


def test_two_spellings_that_agree_are_one_and_others_are_a_mistake() -> None:
    assert load_settings(
        None, NEEDED | {"flash_attention": True, "attn_implementation": "flash_attention_2"}
    )
    found = mistakes(None, NEEDED | {"flash_attention": True, "attn_implementation": "sdpa"})
    assert found == ["attn_implementation: got it beside flash_attention, expected one of the two"]


def test_what_has_no_bearing_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="left out.*dataloader_num_workers, tf32"):
        settings = load_settings(None, NEEDED | {"dataloader_num_workers": 4, "tf32": True})
    assert settings == load_settings(None, NEEDED)


def test_bf16_auto_asks_the_machine() -> None:
    able = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    assert load_settings(None, NEEDED | {"bf16": "auto"}).bf16 is able


def test_every_meaning_is_a_key_of_ours() -> None:
    combined = {"load_in_4bit", "load_in_8bit", INIT, EVERY_STEPS}
    for key, (known, advice) in MEANINGS.items():
        assert advice and key not in KEYS and key not in ALIASES, key
        assert all(set(meaning) <= combined | set(KEYS) for meaning in known.values()), key
        assert all(word == word.lower() for word in known), key


def test_a_flag_takes_back_what_a_file_names(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "model: base\ndata: rows.jsonl\noutput: out\nold_data: old.jsonl\neval_data: new.jsonl\n",
    )
    assert load_settings(path, {"old_data": "null"}).old_data is None
    assert load_settings(path, {"eval_data": "null"}).eval_data is None


def test_a_tilde_is_the_home_folder_in_a_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(tmp_path, "model: ~/base\ndata: rows.jsonl\noutput: ~/out\n")
    s = load_settings(path, {})
    assert (s.model, s.output) == (str(tmp_path / "base"), str(tmp_path / "out"))


def test_a_placeholder_in_yaml_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        load_settings(written(tmp_path, "model: {{ model }}\n"), {})
