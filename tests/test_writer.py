"""What the writer writes is what stock safetensors and transformers read, and what is not whole looks not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pissa.checkpoint.layout import DTYPES, INDEX_NAME
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.writer import CheckpointWriter, TensorFile, parse_bytes
from pissa.errors import CheckpointError, InputError, OutputError


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN and infinity with it; only bool must stay 0 or 1."""
    ceiling = 2 if dtype == torch.bool else 256
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    return torch.randint(ceiling, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8),
            other.contiguous().reshape(-1).view(torch.uint8),
        )
    )


def write_all_and_raise(
    output: TensorFile | CheckpointWriter, tensors: dict[str, torch.Tensor], error: BaseException
) -> None:
    with output:
        for name, tensor in tensors.items():
            output.write(name, tensor)
        raise error


@pytest.fixture
def mixed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"{name}.odd": random_bits(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    for name in ("F32", "BF16", "F16", "I8"):
        tensors[f"{name}.empty"] = random_bits(DTYPES[name], (0, 7))
        tensors[f"{name}.scalar"] = random_bits(DTYPES[name], ())
    tensors["Größe.transposed"] = random_bits(torch.bfloat16, (6, 4)).T
    return tensors


@pytest.fixture
def three() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(16, 16) for name in ("a", "b", "c")}


def test_stock_safetensors_reads_a_file_bit_for_bit(tmp_path: Path, mixed: dict[str, torch.Tensor]):
    path = tmp_path / "mixed.safetensors"
    with TensorFile(path, plan_of(mixed), {"note": "ja"}) as file:
        for name in reversed(mixed):
            file.write(name, mixed[name])
    loaded = load_file(path)
    assert loaded.keys() == mixed.keys()
    with safe_open(path, framework="pt") as stock:
        assert stock.metadata() == {"format": "pt", "note": "ja"}
        for name, tensor in mixed.items():
            assert same_bits(loaded[name], tensor), name
            assert same_bits(stock.get_tensor(name), tensor), name


def test_tensors_and_data_are_aligned(tmp_path: Path, mixed: dict[str, torch.Tensor]):
    path = tmp_path / "mixed.safetensors"
    with TensorFile(path, plan_of(mixed)) as file:
        for name, tensor in mixed.items():
            file.write(name, tensor)
    raw = path.read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    for name, tensor in mixed.items():
        assert entries[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name
    same_width = [name for name in entries if name in mixed and mixed[name].dtype.itemsize == 2]
    assert same_width == [name for name in mixed if mixed[name].dtype.itemsize == 2]


def test_writing_does_not_copy_a_contiguous_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(64, 64, requires_grad=True)
    with TensorFile(tmp_path / "one.safetensors", {"one": (torch.float32, (64, 64))}) as file:
        sent = []
        write = file._file.write
        monkeypatch.setattr(
            file, "_file", Spy(file._file, lambda data: (sent.append(data), write(data)))
        )
        file.write("one", tensor)
        assert torch.frombuffer(sent[0], dtype=torch.uint8).data_ptr() == tensor.data_ptr()


class Spy:
    """A file whose `write` is another function."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self._file.__enter__()

    def __exit__(self, *error):
        return self._file.__exit__(*error)


def test_file_without_all_tensors_is_an_error_and_unreadable(
    tmp_path: Path, three: dict[str, torch.Tensor]
):
    path = tmp_path / "three.safetensors"
    file = TensorFile(path, plan_of(three))
    file.write("c", three["c"])  # the last one, so that the file has its full length
    with pytest.raises(OutputError, match=r"three\.safetensors lacks 2 planned tensors, 'a' first"):
        file.close()
    with pytest.raises(SafetensorError):
        load_file(path)


def test_interrupted_file_is_unreadable_even_with_all_bytes_written(
    tmp_path: Path, three: dict[str, torch.Tensor]
):
    path = tmp_path / "three.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_all_and_raise(TensorFile(path, plan_of(three)), three, KeyboardInterrupt())
    with pytest.raises(SafetensorError):
        load_file(path)


def test_wrong_tensors_are_refused_by_name(tmp_path: Path, three: dict[str, torch.Tensor]):
    file = TensorFile(tmp_path / "three.safetensors", plan_of(three))
    with pytest.raises(
        InputError, match=r"'a' is torch\.bfloat16 .* says torch\.float32 \[16, 16\]"
    ):
        file.write("a", three["a"].bfloat16())
    with pytest.raises(InputError, match=r"'a' is torch\.float32 \[8, 32\]"):
        file.write("a", three["a"].reshape(8, 32))
    with pytest.raises(InputError, match="'d' is not in the plan"):
        file.write("d", three["a"])
    file.write("a", three["a"])
    with pytest.raises(InputError, match=r"'a' was written to .* before"):
        file.write("a", three["a"])
    file.abandon()


@pytest.mark.parametrize("entry", [("w", torch.complex128), ("__metadata__", torch.float32)])
def test_what_safetensors_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, entry):
    name, dtype = entry
    with pytest.raises(InputError, match=f"'{name}' of .* does not fit safetensors"):
        CheckpointWriter(tmp_path / "out", {name: (dtype, (2,))}, 100)
    assert not (tmp_path / "out").exists()


def test_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "one.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"one\.safetensors exists"):
        TensorFile(tmp_path / "one.safetensors", {})
    assert (tmp_path / "one.safetensors").read_text() == "mine"


def test_small_model_is_one_file_without_index(tmp_path: Path, three: dict[str, torch.Tensor]):
    with CheckpointWriter(tmp_path, plan_of(three), max_shard_bytes=3 * 1024) as writer:
        for name, tensor in three.items():
            writer.write(name, tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same_bits(loaded[name], tensor) for name, tensor in three.items())


def test_shards_and_index_read_back_bit_for_bit(tmp_path: Path, mixed: dict[str, torch.Tensor]):
    with CheckpointWriter(tmp_path, plan_of(mixed), max_shard_bytes=100) as writer:
        for name in reversed(mixed):  # against the plan: several shards are open at once
            writer.write(name, mixed[name])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in mixed.values())
    checkpoint = Checkpoint.open(tmp_path, need_config=False)
    assert checkpoint.tensors.keys() == mixed.keys()
    for name, tensor in mixed.items():
        stock = load_file(tmp_path / index["weight_map"][name])[name]
        assert same_bits(stock, tensor), name
        assert same_bits(checkpoint.read(name), tensor), name


def test_large_tensor_gets_a_shard_of_its_own(tmp_path: Path):
    tensors = {
        "a": torch.ones(10),
        "large": torch.ones(1000),
        "b": torch.ones(10),
        "c": torch.ones(10),
    }
    with CheckpointWriter(tmp_path, plan_of(tensors), max_shard_bytes=100) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert [sorted(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [
        ["a"],
        ["large"],
        ["b", "c"],
    ]


def test_shards_are_opened_late_and_closed_with_their_last_tensor(
    tmp_path: Path, three: dict[str, torch.Tensor]
):
    writer = CheckpointWriter(tmp_path, plan_of(three), max_shard_bytes=2048)
    assert list(tmp_path.iterdir()) == []
    writer.write("a", three["a"])
    writer.write("b", three["b"])
    assert load_file(tmp_path / "model-00001-of-00002.safetensors").keys() == {"a", "b"}
    assert not (tmp_path / "model-00002-of-00002.safetensors").exists()
    with pytest.raises(InputError, match="'a' was written"):
        writer.write("a", three["a"])
    writer.abandon()


def test_writer_leaves_no_index_when_interrupted(tmp_path: Path, three: dict[str, torch.Tensor]):
    with pytest.raises(RuntimeError, match="stop"):
        write_all_and_raise(
            CheckpointWriter(tmp_path, plan_of(three), 1024), three, RuntimeError("stop")
        )
    assert not (tmp_path / INDEX_NAME).exists()
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        Checkpoint.open(tmp_path, need_config=False)


def test_writer_leaves_no_index_when_a_tensor_is_missing(
    tmp_path: Path, three: dict[str, torch.Tensor]
):
    writer = CheckpointWriter(tmp_path, plan_of(three), 1024)
    writer.write("a", three["a"])
    writer.write("c", three["c"])
    with pytest.raises(OutputError, match="lacks 1 planned tensors, 'b' first"):
        writer.close()
    assert not (tmp_path / INDEX_NAME).exists()


def test_unplanned_tensor_is_refused_with_a_hint(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, {"model.embed": (torch.float32, (2,))}, 1024)
    with pytest.raises(
        InputError, match=r"'model\.embeds' is not in the plan .* Did you mean 'model\.embed'"
    ):
        writer.write("model.embeds", torch.ones(2))


@pytest.mark.parametrize(
    "stale", ["model.safetensors", INDEX_NAME, "model-00001-of-00009.safetensors"]
)
def test_weights_of_an_older_model_are_not_mixed_in(
    tmp_path: Path, three: dict[str, torch.Tensor], stale: str
):
    (tmp_path / stale).write_text("older")
    with pytest.raises(OutputError, match=f"holds {stale} already"):
        CheckpointWriter(tmp_path, plan_of(three), 1024)


def test_empty_plan_and_empty_shards_are_refused(tmp_path: Path, three: dict[str, torch.Tensor]):
    with pytest.raises(InputError, match="0 tensors"):
        CheckpointWriter(tmp_path, {}, 1024)
    with pytest.raises(InputError, match="shards of 0 bytes"):
        CheckpointWriter(tmp_path, plan_of(three), 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500MB", 500_000_000),
        ("5 GB", 5_000_000_000),
        ("2kb", 2_000),
        ("1.5GiB", 3 * 2**29),
        ("3MiB", 3 * 2**20),
        ("7KiB", 7 * 2**10),
        ("4.35GB", 4_350_000_000),  # in floats 4.35 * 10**9 is a byte short
        ("4096", 4096),
        (4096, 4096),
        (str(10**18 + 1), 10**18 + 1),
    ],
)
def test_sizes_are_read_with_their_units(text: str | int, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-5MB", "5 XB", "1e9", "five", "0", "0.1KiBB", "nan", "5GB5", 0, -1, "0.5", "٥"],
)
def test_sizes_that_are_none_are_refused(text: str | int):
    with pytest.raises(InputError, match="is not a size in bytes"):
        parse_bytes(text)
