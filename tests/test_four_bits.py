"""Residuals in few bits: stock tools load what pissa means, at the size and with the error that is claimed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from conftest import PACKABLE, build_pico
from pissa.errors import InputError, WrongBaseError
from pissa.quant import quantiser
from pissa.records import Layer, Record
from pissa.registry import get
from pissa.surgery.packing import quantisation_config
from runs import error_of, gap, language_model, logits
from test_decompose_refusals import refuse

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*written unpacked")
METHODS = ("qpissa", "loftq", "qlora", "milora")
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "nf4"},
    "double": {"quant": "nf4", "double_quant": True},
    "fp4": {"quant": "fp4"},
    "int8": {"quant": "int8"},
}
FORMAT_OF_EACH_METHOD = {
    "pico-bf16": ("nf4", "double", "fp4", "int8"),
    "partly": ("double", None, None, "nf4"),
    "gpt2": ("fp4", "int8", "nf4", "double"),
    "stories260K": ("int8", "nf4", None, "fp4"),
    "mixed-8m": ("nf4", None, "double", "int8"),
}
"""Beside the pico base, on which every method meets every format."""
SCALE = 1.5
OWN = ("pico", "pico-bf16", "partly", "gpt2")
"""Bases that are built here."""
NOT_WHOLE = ("partly", "stories260K", "mixed-8m")
"""Bases with rows that are no whole blocks."""

STOCK = """
import json, sys, torch, transformers, peft, bitsandbytes
from safetensors.torch import save_file

bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as in conftest.py
torch.set_num_threads(1)
TOKENS = torch.arange(3, 43).reshape(2, 20)

@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits

outputs = {}
for name, folder, again in json.loads(sys.argv[1]):
    load = transformers.AutoModelForCausalLM.from_pretrained
    outputs[name] = logits(peft.PeftModel.from_pretrained(load(folder), folder, subfolder="pissa_init"))
    if again:
        load(folder).save_pretrained(again, save_original_format=False)
assert "pissa" not in sys.modules
save_file(outputs, sys.argv[2])
"""


@dataclass(frozen=True)
class Job:
    base: str
    method: str
    format: str
    rank: int = 4

    @property
    def resaved(self) -> bool:
        return self.method == ("qpissa" if self.base == "pico" else "milora")

    def __str__(self) -> str:
        return f"{self.base}-{self.method}-{self.rank}-{self.format}"


QPISSA, QLORA = (Job("stories260K", method, "nf4", rank=16) for method in ("qpissa", "qlora"))
JOBS = [
    *(Job("pico", method, format) for method in METHODS for format in FORMATS),
    *(
        Job(base, method, format)
        for base, formats in FORMAT_OF_EACH_METHOD.items()
        for method, format in zip(METHODS, formats, strict=True)
        if format
    ),
    QPISSA,
    QLORA,
]
each_job = pytest.mark.parametrize("job", JOBS, ids=str)


def small_gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )


@pytest.fixture(scope="module")
def bases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    build_pico(**PACKABLE).save_pretrained(root / "pico")
    build_pico(**PACKABLE).bfloat16().save_pretrained(root / "pico-bf16")
    build_pico(hidden_size=64, intermediate_size=96).save_pretrained(root / "partly")
    small_gpt2().save_pretrained(root / "gpt2")
    models = shared / "models"
    names = ("pico", *FORMAT_OF_EACH_METHOD)
    return {name: models / name if (models / name).is_dir() else root / name for name in names}


@pytest.fixture(scope="module")
def made(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Job, tuple[Path, Record]]]:
    """The decomposed folder of every job, and its record."""
    root = tmp_path_factory.mktemp("packed")
    yield {
        job: (
            root / str(job),
            pissa.decompose(bases[job.base], root / str(job), job.method, **settings_of(job)),
        )
        for job in JOBS
    }
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def stock(
    made: dict[Job, tuple[Path, Record]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Logits of every job from a process without pissa, which also saved some models again, to `again_of`."""
    file = tmp_path_factory.mktemp("stock") / "logits.safetensors"
    work = [
        (str(job), str(out), str(again_of(out)) if job.resaved else None)
        for job, (out, _) in made.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(work), str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(file)


def settings_of(job: Job) -> dict[str, Any]:
    return {"rank": job.rank, "alpha": SCALE * job.rank, **FORMATS[job.format]}


def again_of(out: Path) -> Path:
    return out / "again"


def load(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def packed_weights(tensors: dict[str, Tensor]) -> set[str]:
    return {
        name.removesuffix(mark) + "weight"
        for name in tensors
        for mark in ("weight.absmax", "SCB")
        if name.endswith("." + mark)
    }


def unpacked(tensors: dict[str, Tensor], weight: str) -> Tensor:
    """What bitsandbytes itself makes of a weight in a file."""
    functional = bitsandbytes.functional
    module = weight.removesuffix("weight")
    if weight not in packed_weights(tensors):
        return tensors[weight]
    if module + "SCB" in tensors:
        return functional.int8_vectorwise_dequant(tensors[weight], tensors[module + "SCB"])
    parts = {
        name.removeprefix(module): part
        for name, part in tensors.items()
        if name.startswith(f"{weight}.")
    }
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    return functional.dequantize_4bit(tensors[weight], state)


def base_matrix(base: Path, layer: Layer) -> Tensor:
    weight = load_file(base / "model.safetensors")[layer.name]
    return weight.T if "gpt2" in base.name else weight  # [out, in]


@each_job
def test_stock_tools_compute_what_pissa_does_bit_for_bit(
    job: Job,
    made: dict[Job, tuple[Path, Record]],
    stock: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        bitsandbytes.nn.modules, "has_avx512bf16", bitsandbytes.functional.has_avx512bf16
    )
    out, record = made[job]
    expected = stock[str(job)]
    assert expected.isfinite().all()
    model = pissa.load(load(out), out).eval()
    assert torch.equal(logits(model), expected)
    config, asked = (
        json.loads((out / "config.json").read_text())["quantization_config"],
        FORMATS[job.format],
    )
    if job.format == "int8":
        assert config["load_in_8bit"]
    else:
        kinds = config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]
        assert kinds == (asked["quant"], asked.get("double_quant", False))
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    packed = {
        name.replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
    names = packed_weights(load_file(out / "model.safetensors"))
    assert packed == {f"base_model.model.{name.removesuffix('.weight')}" for name in names}
    assert names <= {layer.name for layer in record.layers}
    assert (len(names) < len(record.layers)) == (job.format != "int8" and job.base in NOT_WHOLE)


@each_job
def test_the_recorded_error_is_that_of_what_bitsandbytes_unpacks(
    job: Job, bases: dict[str, Path], made: dict[Job, tuple[Path, Record]]
) -> None:
    out, record = made[job]
    residual, start = (
        load_file(out / "model.safetensors"),
        load_file(out / "pissa_init" / "adapter_model.safetensors"),
    )
    # An int8 weight is held against bf16 as if it were unpacked there, which no loader does: a
    # rounding more.
    tolerance = 0.1 if job.format == "int8" and job.base in ("pico-bf16", "mixed-8m") else 1e-4
    for layer in record.layers:
        module = "base_model.model." + layer.name.removesuffix(".weight")
        product = (
            start[f"{module}.lora_B.weight"].double() @ start[f"{module}.lora_A.weight"].double()
        )
        rebuilt = unpacked(residual, layer.name).double() + SCALE * product
        error = error_of(rebuilt, base_matrix(bases[job.base], layer))
        assert layer.error == pytest.approx(error, rel=tolerance), layer.name
        assert 0 < error < (0.02 if job.format == "int8" else 0.2), layer.name


def test_qpissa_starts_closer_to_its_base_than_qlora(
    bases: dict[str, Path], stock: dict[str, Tensor]
) -> None:
    base = logits(load(bases["stories260K"]))
    qpissa, qlora = (error_of(stock[str(job)], base) for job in (QPISSA, QLORA))
    print(f"stories260K, logits off by: QPiSSA {qpissa:.3f}, QLoRA {qlora:.3f}")
    assert 0.001 < qpissa < 0.7 * qlora


@pytest.mark.parametrize("base", ["pico", "stories260K"])
def test_qpissa_and_loftq_lose_less_of_every_weight_than_qlora(
    base: str, bases: dict[str, Path]
) -> None:
    matrix = load_file(bases[base] / "model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ].float()
    errors = {}
    for method in ("qpissa", "loftq", "qlora"):
        errors[method] = error_of(pissa.split(matrix, method, 4).rebuild(), matrix)
    assert errors["qpissa"] < errors["loftq"] < errors["qlora"]


@pytest.mark.parametrize("format", ["nf4", "double", "int8"])
def test_packed_weights_take_the_bits_that_arithmetic_gives_them(
    format: str, made: dict[Job, tuple[Path, Record]]
) -> None:
    (job,) = (job for job in JOBS if job.base == "mixed-8m" and job.format == format)
    out, record = made[job]
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    packed = [layer for layer in record.layers if layer.name in packed_weights(tensors)]
    # 864 is no multiple of 64
    assert len(packed) == len(record.layers) - (6 if job.format != "int8" else 0)
    modules = tuple(layer.name.removesuffix("weight") for layer in packed)
    nbytes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(modules))
    values = sum(layer.shape[0] * layer.shape[1] for layer in packed)
    # A scale a block of 64; 8 bits of it where 256 of them share another scale; int8 has a scale a
    # row.
    rows = sum(layer.shape[0] for layer in packed)
    expected = {"nf4": 4.5, "double": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8 + 32 * rows / values}[
        format
    ]
    print(
        f"{job}: {8 * nbytes / values:.3f} bits a weight, {expected:.3f} without names and tables"
    )
    assert expected < 8 * nbytes / values < 1.03 * expected
    assert file.stat().st_size < 1.03 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("job", [job for job in JOBS if job.resaved], ids=str)
def test_saved_again_by_stock_tools_every_tensor_is_the_same(
    job: Job, made: dict[Job, tuple[Path, Record]], stock: dict[str, Tensor]
) -> None:
    out, _ = made[job]
    before, after = (load_file(folder / "model.safetensors") for folder in (out, again_of(out)))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, again_of(out))]
    assert configs[0]["pissa"] == configs[1]["pissa"]
    settings = FORMATS[job.format]
    assert configs[0]["pissa"]["quant"] == settings["quant"]
    for config in configs:
        said = config["quantization_config"]
        assert (said["load_in_4bit"], said["load_in_8bit"]) == (
            job.format != "int8",
            job.format == "int8",
        )
        if job.format != "int8":
            assert said["bnb_4bit_quant_type"] == settings["quant"]
            assert said["bnb_4bit_use_double_quant"] == settings.get("double_quant", False)


def test_a_residual_saved_again_still_meets_its_start(
    made: dict[Job, tuple[Path, Record]], stock: dict[str, Tensor]
) -> None:
    job = Job("pico", "qpissa", "double")
    out, _ = made[job]
    assert torch.equal(logits(pissa.load(load(again_of(out)), out).eval()), stock[str(job)])


@pytest.mark.parametrize(
    "job", [job for job in JOBS if job.method == "qpissa" and job.base in OWN], ids=str
)
def test_stored_in_16_bits_the_residual_is_what_the_packed_one_stands_for(
    job: Job,
    bases: dict[str, Path],
    made: dict[Job, tuple[Path, Record]],
    stock: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    packed, packed_record = made[job]
    record = pissa.decompose(
        bases[job.base], tmp_path / "out", job.method, **settings_of(job), store="16bit"
    )
    assert record.layers == packed_record.layers
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    base, parts, plain = (
        load_file(f / "model.safetensors") for f in (bases[job.base], packed, tmp_path / "out")
    )
    assert {name: (t.dtype, t.shape) for name, t in plain.items()} == {
        n: (t.dtype, t.shape) for n, t in base.items()
    }
    targets = {layer.name for layer in record.layers}
    for name, tensor in plain.items():
        expected = base[name] if name not in targets else unpacked(parts, name)
        expected = expected.T if job.base == "gpt2" and name in targets else expected
        if job.format == "int8" and name in targets:  # bitsandbytes multiplies by a rounded 1 / 127
            assert torch.allclose(
                tensor.float(), expected, rtol=torch.finfo(tensor.dtype).eps, atol=0
            )
        else:
            assert torch.equal(tensor, expected), name
    first, second = (
        load_file(f / "pissa_init" / "adapter_model.safetensors")
        for f in (packed, tmp_path / "out")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    # And both are one model to stock tools, but for products of 8 or 16 bits.
    got = logits(pissa.load(load(tmp_path / "out"), tmp_path / "out").eval())
    assert error_of(got, stock[str(job)]) < 0.02


@pytest.mark.parametrize("format", ["double", "int8"])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], r"model\.layers\.1\..*_proj"], ids=str
)
def test_layers_left_out_stay_as_they_are_and_are_named_in_the_config(
    targets: str | list[str], format: str, tmp_path: Path
) -> None:
    build_pico(tie_word_embeddings=False, **PACKABLE).bfloat16().save_pretrained(tmp_path / "base")
    record = pissa.decompose(
        tmp_path / "base", tmp_path / "out", rank=2, targets=targets, **FORMATS[format]
    )
    base, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    packed = {layer.name.removesuffix(".weight") for layer in record.layers}
    linear = {name.removesuffix(".weight") for name in base if "_proj" in name or "lm_head" in name}
    assert len(packed) == {"all-linear": 14, "q_proj": 2}.get("".join(targets), 7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert linear - packed <= set(config["llm_int8_skip_modules"])
    assert not packed & set(config["llm_int8_skip_modules"])
    for name, tensor in base.items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(parts[name], tensor), name
    model = load(tmp_path / "out")
    kinds = {name: type(model.get_submodule(name)).__name__ for name in linear}
    assert {name for name, kind in kinds.items() if kind != "Linear"} == packed
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert (
        gap(logits(pissa.load(model, tmp_path / "out").eval()), logits(load(tmp_path / "base")))
        < 0.3
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "q_proj"]], ids=str)
def test_what_bitsandbytes_cannot_compute_with_is_quantised_but_not_packed(
    targets: str | list[str], tmp_path: Path
) -> None:
    """Embeddings, and rows that are no whole blocks; the config names the linear ones among them."""
    base = tmp_path / "base"
    build_pico(tie_word_embeddings=False, hidden_size=64, intermediate_size=96).save_pretrained(
        base
    )
    settings = {"rank": 4, "targets": targets, "quant": "nf4"}
    odd = "embed_tokens" if "embed_tokens" in targets else "down_proj"
    with pytest.warns(
        UserWarning, match=rf"of \d+ weights are quantised but written unpacked, `.*{odd}"
    ):
        record = pissa.decompose(base, tmp_path / "out", **settings)
    pissa.decompose(base, tmp_path / "plain", **settings, store="16bit")
    parts, plain, before = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain", "base")
    )
    left = {layer.name for layer in record.layers} - packed_weights(parts)
    assert left == {name for name in before if odd in name}
    for name in left:
        assert torch.equal(parts[name], plain[name])
        assert not torch.equal(parts[name], before[name])
    assert all(layer.error > 0.01 for layer in record.layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in left if "proj" in name} <= set(
        config["llm_int8_skip_modules"]
    )
    assert (
        gap(
            logits(pissa.load(load(tmp_path / "out"), tmp_path / "out").eval()),
            logits(language_model(base)),
        )
        < 0.3
    )


@pytest.mark.parametrize("store", ["packed", "16bit"])
def test_gpt2s_weights_lie_the_usual_way_round_where_they_are_packed(
    store: str, tmp_path: Path
) -> None:
    small_gpt2().save_pretrained(tmp_path / "base")
    record = pissa.decompose(tmp_path / "base", tmp_path / "out", "qpissa", 4, store=store)
    assert record.recipe is not None
    assert set(record.recipe.targets.values()) == {"linear" if store == "packed" else "conv1d"}
    config = json.loads((tmp_path / "out" / "pissa_init" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (store == "16bit")


def test_names_that_no_config_can_tell_apart_are_refused() -> None:
    """transformers goes by the ends of names, so leaving out `proj` would leave out `q_proj` too."""
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    with pytest.raises(InputError, match="`q_proj`.*target both or neither"):
        quantisation_config(quantiser("nf4"), model, {"q_proj"}, torch.float32)
    config = quantisation_config(quantiser("nf4"), model, {"proj"}, torch.float32)
    assert "q_proj" in config["llm_int8_skip_modules"]
    assert "proj" not in config["llm_int8_skip_modules"]


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "quantiser": ({"quant": "nf5"}, "unknown quantiser 'nf5'.*Did you mean 'nf4'"),
    "store": ({"quant": "nf4", "store": "8bit"}, "store is '8bit', expected one of packed, 16bit"),
    "store without a quantiser": (
        {"store": "16bit"},
        "store is '16bit', which has a meaning only with a quantiser",
    ),
    "double int8": ({"quant": "int8", "double_quant": True}, "int8 has not"),
    "double int8 in 16 bits": (
        {"quant": "int8", "double_quant": True, "store": "16bit"},
        "int8 has not",
    ),
    "rounds without a quantiser": ({"iterations": 3}, "iterations is 3.*only with a quantiser"),
    "rounds of lora": (
        {"method": "lora", "quant": "nf4", "iterations": 3},
        "iterations is 3 with lora",
    ),
    "rounds of a preset": (
        {"method": "qlora", "iterations": 2},
        "iterations is 2 with lora.*loftq, pissa",
    ),
    "no rounds": ({"method": "qpissa", "iterations": 0}, "iterations is 0, expected 1 or more"),
    "preset": ({"method": "qpisa"}, "Did you mean 'qpissa'"),
    "embedding": (
        {"quant": "nf4", "targets": ["embed_tokens"]},
        r"no weight can be packed: `.*embed_tokens.*16bit",
    ),
    "rows of 32": ({"quant": "nf4"}, r"no weight can be packed: `.*_proj.*16bit"),
    "double without a quantiser": (
        {"double_quant": True},
        "double_quant has a meaning only with a quantiser",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_one_error_and_no_output(
    case: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings, message = BAD_SETTINGS[case]
    refuse(
        InputError, message, pico_folder(tie_word_embeddings=False), tmp_path / "out", **settings
    )


def test_loftq_means_four_bits_and_is_nothing_without_a_quantiser(
    pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = pissa.decompose(pico_folder(**PACKABLE), tmp_path / "out", "loftq", 4).recipe
    assert recipe is not None
    assert (recipe.method, recipe.quant, recipe.iterations) == ("loftq", "nf4", 5)
    with pytest.raises(InputError, match="name the quantiser, --quant nf4"):
        get("loftq").split(torch.eye(8), 4)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_base_that_stock_tools_quantised_is_refused(
    settings: dict[str, bool], pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pico_folder(), quantization_config=config
    )
    model.save_pretrained(tmp_path / "quantised", save_original_format=False)
    refuse(
        InputError,
        r"quantised \(bitsandbytes",
        tmp_path / "quantised",
        tmp_path / "out",
        quant="nf4",
    )


@pytest.mark.parametrize("store", ["packed", "16bit"])
def test_a_decomposed_base_is_refused(
    store: str, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pissa.decompose(pico_folder(**PACKABLE), tmp_path / "first", "qpissa", 4, store=store)
    refuse(WrongBaseError, "itself a residual", tmp_path / "first", tmp_path / "out", quant="nf4")


def test_a_weight_above_float16_is_refused_by_int8_alone(tmp_path: Path) -> None:
    model = build_pico(**PACKABLE).bfloat16()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "base")
    refuse(
        InputError,
        r"`model\.layers\.1\.mlp\.up_proj\.weight`.*65504.*use nf4",
        tmp_path / "base",
        tmp_path / "out",
        method="lora",
        quant="int8",
    )
    pissa.decompose(tmp_path / "base", tmp_path / "out", "lora", 4, quant="nf4")
