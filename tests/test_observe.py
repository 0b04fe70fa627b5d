"""What is gathered of a live model is what its layers saw, and the model is none the wiser."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from conftest import build_pico
from pissa.checkpoint.fingerprint import model_tensors
from pissa.errors import CheckpointError, InputError, OutputError, WrongBaseError
from pissa.method import OBSERVED
from pissa.observe import Observations, observe
from pissa.observe.accumulators import Sample

Q, K, DOWN = (
    f"layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)


def batches(count: int = 3, samples: int = 3, length: int = 10) -> list[dict[str, Tensor]]:
    """Rows of tokens, padded on the right: the first samples are the shortest."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 96, (samples, length), generator=generator)
        mask = torch.arange(length) < torch.arange(4, 4 + 3 * samples, 3)[:, None]
        labels = torch.where(mask & (torch.arange(length) > 1), ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return made


def entered(model: Any, batch: dict[str, Tensor], module: str) -> list[np.ndarray[Any, Any]]:
    """The rows of each sample that enter a layer, read without padding: each sample by itself."""
    rows: list[np.ndarray[Any, Any]] = []
    handle = model.get_submodule(f"model.{module}").register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0][0].double().numpy())
    )
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            model(input_ids=ids[mask][None])
    handle.remove()
    return rows


def all_entered(
    model: Any, read: list[dict[str, Tensor]], module: str
) -> list[np.ndarray[Any, Any]]:
    return [sample for batch in read for sample in entered(model, batch, module)]


@pytest.mark.parametrize("module", ["layers.1.self_attn.k_proj", "layers.1.mlp.down_proj"])
def test_the_covariance_is_that_of_unpadded_samples_each_scaled_by_its_peak(
    pico: Any, module: str
) -> None:
    samples = all_entered(pico, batches(), module)
    expected = sum((x / np.abs(x).max()).T @ (x / np.abs(x).max()) for x in samples) / len(samples)
    got = observe(pico, batches(), "covariance").get("covariance", f"{module}.weight")
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_components_are_those_of_all_unpadded_rows(pico: Any) -> None:
    rows = np.concatenate(all_entered(pico, batches(), "layers.1.self_attn.k_proj"))
    seen = observe(pico, batches(), "components", components=16).get("components", K).leading(8)
    values, vectors = np.linalg.svd(rows - rows.mean(0))[1:]
    assert np.allclose(seen.values, values[:8], rtol=1e-4)
    assert np.abs(np.diag(seen.vectors.numpy() @ vectors[:8].T)).min() > 0.999
    assert seen.rows == len(rows)
    assert np.isclose(seen.energy, np.square(values).sum(), rtol=1e-5)


def test_the_sample_of_inputs_holds_unpadded_rows_each_once(pico: Any) -> None:
    rows = np.concatenate(all_entered(pico, batches(), "layers.1.mlp.down_proj"))
    apart = np.abs(
        observe(pico, batches(), "inputs", inputs=20).get("inputs", DOWN).numpy()[:, None] - rows
    ).max(2)
    assert apart.shape == (20, len(rows)) and (apart.min(1) < 1e-5).all()
    assert len(set(apart.argmin(1))) == 20
    one, other = (
        observe(pico, batches(), "inputs", inputs=20, seed=seed).get("inputs", DOWN)
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)
    every = observe(pico, batches(), "inputs", inputs=10**6).get("inputs", DOWN)
    assert np.allclose(np.sort(every.numpy(), 0), np.sort(rows, 0), atol=1e-5)


def test_each_row_is_drawn_with_the_same_chance() -> None:
    drawn = []
    for seed in range(200):
        sample = Sample(5, 1, seed)
        for rows in torch.arange(40.0)[:, None].split(8):
            sample.add(rows, torch.zeros(8))
        drawn.append(sample.result())
    # 25 of each, give or take 5
    counts = torch.bincount(torch.cat(drawn).long().flatten(), minlength=40)
    assert counts.min() > 7 and counts.max() < 45
    assert abs(int(counts[:20].sum()) - 500) < 60


def test_of_a_model_on_disk_all_but_the_gradient_is_seen(pico: Any, tmp_path: Path) -> None:
    model = accelerate.disk_offload(copy.deepcopy(pico), tmp_path)
    needs = ("covariance", "components", "inputs")
    seen, expected = observe(model, batches(), needs), observe(pico, batches(), needs)
    assert seen.base == expected.base
    assert torch.allclose(seen.get("covariance", K), expected.get("covariance", K), rtol=1e-6)
    assert all(p.is_meta and p.requires_grad for p in model.model.layers.parameters())
    with pytest.raises(InputError, match="Of an offloaded model all but the gradient is seen"):
        observe(model, batches(), "gradient")


def test_only_tokens_with_labels_are_seen_when_asked(pico: Any) -> None:
    read = batches()
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in read)
    seen = observe(pico, read, "components", labelled_only=True)
    assert seen.get("components", Q).rows == seen.facts["tokens"] == labelled
    with pytest.raises(InputError, match="labelled_only needs a label for each token"):
        observe(pico, [{"input_ids": read[0]["input_ids"]}], "components", labelled_only=True)


def test_the_gradient_is_the_mean_of_direct_backward_passes(pico: Any) -> None:
    seen = observe(pico, batches(), "gradient")
    expected = {
        name: torch.zeros_like(seen.get("gradient", name)) for name in seen.seen["gradient"]
    }
    for batch in batches():
        pico.zero_grad()
        pico(**batch).loss.backward()
        for name in expected:
            expected[name] += pico.get_parameter(f"model.{name}").grad / 3
    assert len(expected) == 14
    for name, mean in expected.items():
        assert (seen.get("gradient", name) - mean).norm() < 1e-6 * mean.norm(), name


def test_gradients_of_a_16_bit_model_add_up_in_32_bits(pico: Any) -> None:
    model = pico.bfloat16()
    got = observe(model, batches(1) * 3, "gradient").get("gradient", DOWN)
    once = observe(model, batches(1), "gradient").get("gradient", DOWN)
    assert got.dtype == torch.float32
    assert torch.allclose(got, once, rtol=1e-6)  # three times a number of 8 bits has 10


def test_a_transposed_linear_gives_its_gradient_as_out_by_in() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    seen = observe(model, batches(1), ("gradient", "covariance"))
    model(**batches(1)[0]).loss.backward()
    expected = model.transformer.h[0].attn.c_attn.weight.grad
    assert torch.allclose(seen.get("gradient", "h.0.attn.c_attn.weight"), expected.T, rtol=1e-5)
    assert seen.get("covariance", "h.0.mlp.c_proj.weight").shape == (64, 64)


def test_layers_with_the_very_same_input_share_what_is_kept(pico: Any) -> None:
    seen = observe(pico, batches(), ("covariance", "inputs"))
    assert len(seen.seen["covariance"]) == len(seen.seen["inputs"]) == 8  # of 14 layers
    assert seen.get("covariance", K) is seen.get("covariance", Q)
    assert seen.get("covariance", DOWN) is not seen.get("covariance", Q)


class TwoPaths(nn.Module):
    """`second` reads what `first` reads, or what `first` read before it was written to, or that of one batch alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(3, 3), nn.Linear(3, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        first = self.first(y)
        if self.kind == "written":
            y.mul_(2)
        if self.kind == "by batch" and x.sum() > 0:
            y = y * 2
        return first + self.second(y)


def test_a_tensor_that_was_written_to_is_another_input() -> None:
    seen = observe(TwoPaths("written"), [{"x": torch.rand(5, 3)}], "inputs")
    assert torch.equal(
        seen.get("inputs", "second.weight").sort(0).values,
        2 * seen.get("inputs", "first.weight").sort(0).values,
    )
    with pytest.raises(
        InputError, match=r"`second.weight` does not have the same input as `first.weight` in every"
    ):
        observe(TwoPaths("by batch"), [{"x": -torch.ones(5, 3)}, {"x": torch.ones(5, 3)}], "inputs")


def state_of(model: nn.Module) -> Any:
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    backward = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
    return (
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        (hooks, any(backward)),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(pico: Any, fails: bool) -> None:
    pico.train()
    pico.model.layers[0].eval()
    pico.lm_head.weight.requires_grad_(False)
    pico.model.norm.weight.grad = torch.ones(32)
    before, weights = state_of(pico), copy.deepcopy(pico.state_dict())
    read = batches()
    if fails:
        read[1] = {key: value for key, value in read[1].items() if key != "labels"}
        with pytest.raises(
            InputError, match="the gradient needs a loss, and the model gave none for batch 1"
        ):
            observe(pico, read, OBSERVED)
    else:
        observe(pico, read, OBSERVED)
    assert state_of(pico) == before
    assert pico.model.norm.weight.grad is before[0]["model.norm.weight"][1]
    assert all(torch.equal(value, weights[name]) for name, value in pico.state_dict().items())


def test_no_gradient_outlives_the_moment_it_is_made(pico: Any) -> None:
    left: list[int] = []
    observe(
        pico,
        batches(),
        "gradient",
        progress=lambda done, total: left.append(
            sum(p.grad is not None for p in pico.parameters())
        ),
    )
    assert left == [0, 0, 0]


def test_dropout_is_off_while_the_model_reads(pico: Any) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
        )
    ).train()
    read = [{**batch, "labels": torch.tensor([0, 1, 1])} for batch in batches()]
    one, other = (observe(model, read, OBSERVED) for _ in range(2))
    name = "pooler.dense.weight"  # reads one row of each sample
    assert one.get("components", name).rows == 9
    assert torch.equal(one.get("gradient", name), other.get("gradient", name))


def test_scratch_changes_nothing_and_leaves_nothing(pico: Any, tmp_path: Path) -> None:
    needs = ("covariance", "gradient")
    one, other = observe(pico, batches(), needs), observe(pico, batches(), needs, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    for need in needs:
        assert all(
            torch.equal(value, other.seen[need][name]) for name, value in one.seen[need].items()
        )
    with pytest.raises(OutputError, match="has no room"):
        observe(pico, batches(), needs, scratch=tmp_path / "absent")


@pytest.fixture
def everything(pico: Any) -> Observations:
    return observe(pico, batches(), OBSERVED, components=5)


def test_a_file_gives_back_what_was_saved_and_reads_only_what_is_asked_for(
    everything: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "seen.safetensors"
    everything.facts["data"] = "sha256 of the rows"
    everything.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["seen.safetensors"]
    read = []

    def counting(path: Path, framework: str) -> Any:
        read.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr("pissa.observe.observations.safe_open", counting)
    loaded = Observations.load(file)
    assert len(read) == 1  # the header's facts
    assert (loaded.facts, loaded.base, loaded.same) == (
        everything.facts,
        everything.base,
        everything.same,
    )
    for need in ("covariance", "inputs", "gradient"):
        assert list(loaded.seen[need]) == list(everything.seen[need])
        assert torch.equal(loaded.get(need, K), everything.get(need, K))
    assert len(read) == 4
    one, other = loaded.get("components", K), everything.get("components", K)
    for field in dataclasses.fields(one):
        assert torch.equal(
            *(torch.as_tensor(getattr(side, field.name)) for side in (one, other))
        ), field.name
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_file_is_not_overwritten_unasked_nor_read_when_it_is_another(
    everything: Observations, tmp_path: Path, pico_folder: Callable[..., Path]
) -> None:
    file = tmp_path / "seen.safetensors"
    everything.save(file)
    with pytest.raises(OutputError, match="is there"):
        everything.save(file)
    everything.save(file, force=True)
    with pytest.raises(CheckpointError, match="holds no observations"):
        Observations.load(pico_folder() / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        Observations.load(file)


def test_another_base_is_refused_whatever_the_head_and_the_dtype(
    everything: Observations, pico: Any
) -> None:
    everything.check(model_tensors(pico))
    everything.check(model_tensors(pico.model))
    everything.check(model_tensors(copy.deepcopy(pico).bfloat16()))
    with pytest.raises(
        WrongBaseError, match=r"the observation was made for another base: `layers.0.self_attn.q_"
    ):
        everything.check(model_tensors(build_pico(1)))


def test_what_was_not_observed_is_named_with_what_to_do(pico: Any) -> None:
    seen = observe(pico, batches(), "inputs", targets=["q_proj"])
    with pytest.raises(
        InputError, match=rf"`{Q}` was observed for inputs, not for gradient: observe that too"
    ):
        seen.get("gradient", Q)
    with pytest.raises(InputError, match=rf"there is no inputs of `{DOWN}` .it was not a target"):
        seen.get("inputs", DOWN)
    model = TwoPaths("plain")
    model.third = nn.Linear(3, 3)  # which forward passes by
    with pytest.raises(InputError, match="the rows that were read did not reach this layer"):
        observe(model, [{"x": torch.rand(2, 3)}], "inputs").get("inputs", "third.weight")


def test_the_same_batch_twice_is_enough_for_components_to_settle(pico: Any) -> None:
    seen = observe(pico, iter(batches(1) * 5), "components", components=4, tau=0.99)
    assert seen.facts["batches"] == 2


def test_components_that_do_not_settle_within_the_passes_are_an_error(pico: Any) -> None:
    with pytest.raises(
        InputError, match=r"still turn after 1 passes, `layers.0.self_attn.q_proj.weight` first"
    ):
        observe(pico, batches(1), "components", tau=0.99)
    assert observe(pico, batches(1), "components", tau=0.99, passes=3).facts["batches"] == 2


FOUR_D = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 1, 2, 2)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "need": ({"needs": "hessian"}, "needs are hessian, expected some of covariance"),
    "none": ({"needs": ()}, "needs are none"),
    "components": ({"components": 0}, "components is 0, expected 1 or more"),
    "tau": ({"tau": 1.5, "needs": "components"}, "tau is 1.5, expected a cosine"),
    "tau alone": ({"tau": 0.9}, "tau says when components are seen well enough"),
    "passes": ({"passes": 2}, "several passes need a tau to stop at"),
    "no batches": ({"batches": []}, "process 0 of 1 read 0 batches"),
    "embedding": ({"targets": ["embed_tokens"]}, "is of kind embedding, of which only the gradient is seen"),
    "mask": ({"batches": [FOUR_D]}, "expected .samples, tokens."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    settings = {"batches": batches(1), "needs": "covariance"} | changes
    model = build_pico(tie_word_embeddings=False)
    with pytest.raises(InputError, match=message):
        observe(model, settings.pop("batches"), settings.pop("needs"), **settings)


def test_values_that_are_not_numbers_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"what enters `0.weight` has NaN or Inf"):
        observe(model, [{"input": torch.tensor([[1.0, 2.0, float("inf")]])}], "covariance")


SECOND = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from pissa.observe import observe

torch.set_num_threads(1)
place = sys.argv[1]
dist.init_process_group("gloo", f"file://{place}/meeting", timedelta(seconds=90), rank=1, world_size=2)
model, own = LlamaForCausalLM.from_pretrained(f"{place}/base"), torch.load(f"{place}/batches.pt")[1::2]
needs = ("covariance", "components", "gradient", "inputs")
observe(model, own, needs, components=16, inputs=10**6).save(f"{place}/1.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_see_what_one_sees(pico: Any, tmp_path: Path) -> None:
    one = observe(pico, batches(), OBSERVED, components=16, inputs=10**6)
    pico.save_pretrained(tmp_path / "base")
    torch.save(batches(), tmp_path / "batches.pt")
    second = subprocess.Popen([sys.executable, "-c", SECOND, str(tmp_path)])
    meeting = f"file://{tmp_path}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=90), rank=0, world_size=2)
    try:
        observe(pico, batches()[::2], OBSERVED, components=16, inputs=10**6).save(
            tmp_path / "0.safetensors"
        )
    finally:
        dist.destroy_process_group()
        assert second.wait(timeout=90) == 0
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    two = Observations.load(tmp_path / "0.safetensors")
    assert {key: two.facts[key] for key in ("batches", "samples", "tokens")} == {
        "batches": 3,
        "samples": 9,
        "tokens": 63,
    }
    for name in one.base:
        for need in ("covariance", "gradient"):
            assert torch.allclose(two.get(need, name), one.get(need, name), rtol=1e-5, atol=1e-7), (
                need,
                name,
            )
        rows, expected = (side.get("inputs", name).sort(0).values for side in (two, one))
        assert torch.allclose(rows, expected, atol=1e-6)
        got, wanted = (side.get("components", name) for side in (two, one))
        assert got.rows == wanted.rows and got.energy == pytest.approx(wanted.energy, rel=1e-6)
        assert torch.allclose(got.values, wanted.values, rtol=1e-3)
