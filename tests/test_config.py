"""Claims about settings: every mistake in one report, other tools' spellings, flags over YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from pissa.config import ALIASES, KEYS, TrainSettings, load_settings
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
    assert (s.learning_rate, s.lr_scheduler, s.warmup_ratio, s.weight_decay) == (2e-5, "cosine", 0.03, 0)
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
    settings = load_settings(None, NEEDED | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8})
    assert (settings.batch_size, settings.micro_batch_size) == (32, 4)
    assert "beside micro_batch_size" in mistakes(None, NEEDED | {"gradient_accumulation_steps": 8})[0]
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
    assert mistakes(None, NEEDED | {"eval_data": "x", "val_set_size": 0.1})[0].startswith("eval_size: got 0.1")
    assert mistakes(None, NEEDED | {"eval_size": 1.5})[0].endswith("expected a share below 1 or a whole number of rows")


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
