"""A run on disk: what was trained comes back bit for bit on its own base, and on no other."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pissa
from conftest import build_pico
from pissa.errors import CheckpointError, InputError, OutputError, WrongBaseError
from runs import gap, logits, train
from test_laws import every_pair_of_the_weight

Q_PROJ = "layers.1.self_attn.q_proj.weight"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Tensor]:
    """A trained and saved pico run, and its output."""
    model = train(pissa.attach(build_pico(), rank=4, alpha=6))
    assert gap(logits(model), logits(build_pico())) > 0.1
    return pissa.save(model, tmp_path / "run"), logits(model)


@every_pair_of_the_weight
def test_a_run_comes_back_with_its_bits_and_goes_on_with_the_same_bits(method, tmp_path):
    model = train(pissa.attach(build_pico(), method, rank=4))
    pissa.save(model, tmp_path / "run")
    for folder in ("run", "run/state"):
        again = pissa.load(build_pico(), tmp_path / folder).eval()
        assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(train(again)), logits(train(model)))


@every_pair_of_the_weight
def test_restart_gives_the_start_of_a_run(method, tmp_path):
    model = pissa.attach(build_pico(), method, rank=4)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    pissa.save(model, tmp_path / "run")
    train(model)
    pissa.save(model, tmp_path / "trained")
    again = pissa.restart(build_pico(), tmp_path / "run" / "state").state_dict()
    assert all(torch.equal(again[key], start[key]) for key in start)
    # A zero start keeps no separate start: its restart is from the state that was saved first
    if method != "lora":
        late = pissa.restart(build_pico(), tmp_path / "trained" / "state").state_dict()
        assert all(torch.equal(late[key], start[key]) for key in start)


@pytest.mark.parametrize("part", ["adapter", "state", "."])
def test_every_folder_of_a_run_loads(run, part):
    folder, expected = run
    again = pissa.load(build_pico(), folder / part).eval()
    assert gap(logits(again), expected) < 1e-5
    assert any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("part", ["adapter", "."])
def test_loaded_for_use_nothing_trains(run, part):
    folder, expected = run
    again = pissa.load(build_pico(), folder / part, trainable=False)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert gap(logits(again), expected) < 1e-5


@pytest.mark.parametrize("part", ["adapter", "."])
def test_a_run_loads_beside_another_adapter(run, part):
    folder, expected = run
    model = train(pissa.attach(build_pico(), "milora", rank=3, adapter_name="first"))
    first = logits(model)
    model = pissa.load(model, folder / part, adapter_name="second")
    model.set_adapter("second")
    assert gap(logits(model.eval()), expected) < 1e-5
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("part", ["adapter", "state", "."])
@pytest.mark.parametrize("entry", [(0, 0), (7, 3)])
def test_one_changed_entry_of_the_base_is_refused_by_name(run, part, entry):
    other = build_pico()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[entry] += 1e-3
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(
        WrongBaseError, match=f"`{Q_PROJ}` .* has digest .* expected .*Use the base it was made on"
    ):
        pissa.load(other, run[0] / part)
    assert not hasattr(other, "peft_config")
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_changed_weight_that_no_adapter_touches_is_refused_too(run):
    other = build_pico()
    with torch.no_grad():
        other.model.norm.weight[3] += 1
    with pytest.raises(WrongBaseError, match=r"`norm\.weight`"):
        pissa.load(other, run[0])


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"num_hidden_layers": 1}, {"intermediate_size": 64}], ids=str
)
def test_another_model_is_refused(run, other):
    with pytest.raises(WrongBaseError, match="made for another base"):
        pissa.load(build_pico(**other), run[0])


def test_a_residual_in_memory_is_refused(run):
    residual = pissa.attach(build_pico(), "milora", rank=4, base="residual", adapter_name="other")
    with pytest.raises(WrongBaseError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        pissa.load(residual, run[0], adapter_name="second")


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded_in", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_run_loads_on_the_same_base_in_another_dtype(made_in, loaded_in, tmp_path):
    stored = build_pico().to(made_in)
    values = {key: value.clone() for key, value in stored.state_dict().items()}
    model = train(pissa.attach(stored, rank=4))
    pissa.save(model, tmp_path / "run")
    other = build_pico()
    other.load_state_dict(values)
    again = pissa.load(other.to(loaded_in), tmp_path / "run").eval()
    tolerance = 1e-6 if made_in == loaded_in else 0.05
    assert gap(logits(again), logits(model)) < tolerance


def test_the_adapter_folder_is_plain_and_says_its_rank(run):
    config = json.loads((run[0] / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    known = set(peft.LoraConfig().to_dict())
    assert set(config) <= known
    tensors = load_file(run[0] / "adapter" / "adapter_model.safetensors")
    assert {tuple(t.shape)[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {8}


def test_saving_again_replaces_and_leaves_no_litter(run, tmp_path):
    model = train(pissa.load(build_pico(), run[0]))
    pissa.save(model, run[0])
    assert torch.equal(logits(pissa.load(build_pico(), run[0]).eval()), logits(model))
    assert sorted(path.name for path in run[0].iterdir()) == ["adapter", "state"]


def test_saving_into_a_strangers_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(OutputError, match="is not empty and is not a run"):
            pissa.save(pissa.attach(build_pico(), rank=2), place)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_saving_names_the_adapter_when_there_are_two(tmp_path):
    model = pissa.attach(
        pissa.attach(build_pico(), rank=2), "milora", rank=2, adapter_name="second"
    )
    with pytest.raises(InputError, match="attached here: default, second"):
        pissa.save(model, tmp_path / "run")
    pissa.save(model, tmp_path / "run", adapter_name="second")
    assert (
        json.loads((tmp_path / "run" / "state" / "pissa.json").read_text())["recipe"]["method"]
        == "milora"
    )
    stranger = peft.get_peft_model(build_pico(), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(InputError, match="attached here: none"):
        pissa.save(stranger, tmp_path / "other")


STATE = Path("state") / "state.safetensors"


def drop_tensor(run: Path) -> None:
    tensors = load_file(run / STATE)
    tensors.pop("model.layers.0.mlp.up_proj.drift_left")
    save_file(tensors, run / STATE)


def reshape_tensor(run: Path) -> None:
    tensors = load_file(run / STATE)
    tensors["model.layers.0.mlp.up_proj.drift_left"] = torch.zeros(3, 3)
    save_file(tensors, run / STATE)


def truncate(run: Path) -> None:
    (run / STATE).write_bytes((run / STATE).read_bytes()[:-100])


def empty(run: Path) -> None:
    (run / STATE).write_bytes(b"")


def remove(run: Path) -> None:
    (run / STATE).unlink()


def cut_record(run: Path) -> None:
    path = run / "state" / "pissa.json"
    path.write_text(path.read_text()[:-200])


def drop_notes(run: Path) -> None:
    path = run / "state" / "pissa.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": {}}))


def from_the_future(run: Path) -> None:
    path = run / "state" / "pissa.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_tensor, "lacks tensor 'model.layers.0.mlp.up_proj.drift_left'"),
        (reshape_tensor, "up_proj"),
        (truncate, "state.safetensors"),
        (empty, "state.safetensors"),
        (remove, "state.safetensors"),
        (cut_record, "pissa.json"),
        (drop_notes, "pissa.json"),
        (from_the_future, "format 99"),
    ],
)
def test_a_damaged_state_is_named_and_the_model_stays_as_it_was(run, damage, message):
    damage(run[0])
    model = build_pico()
    with pytest.raises(CheckpointError, match=message):
        pissa.load(model, run[0])
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(build_pico()))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            CheckpointError, match="neither a run, nor a decomposed folder, nor a LoRA adapter"
        ):
            pissa.load(build_pico(), folder)


def test_a_strangers_lora_is_refused_because_its_base_is_unknown(tmp_path):
    peft.get_peft_model(
        build_pico(), peft.LoraConfig(r=2, target_modules="all-linear")
    ).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has no pissa\.json, so the base it needs cannot be checked"
    ):
        pissa.load(build_pico(), tmp_path)
