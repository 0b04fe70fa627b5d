"""A folder is read one tensor at a time; whatever is damaged, incomplete or unsafe is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from pissa.checkpoint import reader
from pissa.checkpoint.layout import INDEX_NAME, MAX_HEADER_BYTES, TensorInfo, read_header
from pissa.checkpoint.reader import Checkpoint
from pissa.errors import CheckpointError

ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def raw_file(
    path: Path, header: Any, data_bytes: int = 24, header_bytes: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def one(**changes: Any) -> dict[str, Any]:
    return {"w": {**ONE["w"], **changes}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with one tensor each."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        {"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    write_index(
        tmp_path, {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    )
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_checkpoint_lists_tensors_in_their_order_on_disk(model: Path):
    checkpoint = Checkpoint.open(model, "main")
    assert checkpoint.folder == model
    assert checkpoint.name == str(model)
    assert checkpoint.revision == "main"
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.tensors.items()) == [
        ("a", TensorInfo(torch.float32, (2, 3), 24, "model-00001-of-00002.safetensors")),
        ("b", TensorInfo(torch.bfloat16, (4,), 8, "model-00002-of-00002.safetensors")),
    ]


def test_order_on_disk_is_that_of_the_offsets_not_of_the_header(tmp_path: Path):
    entries = {
        "late": {"dtype": "U8", "shape": [3], "data_offsets": [4, 7]},
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [4, 4]},
        "early": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    path = raw_file(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}, **entries}, 7)
    assert list(read_header(path)) == ["early", "empty", "late"]


def test_tensors_are_read_one_by_one_across_shards(model: Path):
    checkpoint = Checkpoint.open(str(model))
    for _ in range(2):
        assert torch.equal(checkpoint.read("a"), torch.ones(2, 3))
        assert torch.equal(checkpoint.read("b"), torch.zeros(4, dtype=torch.bfloat16))


def test_a_tensor_outlives_the_handle_of_its_shard(model: Path):
    checkpoint = Checkpoint.open(model)
    tensor = checkpoint.read("a")
    checkpoint.read("b")
    del checkpoint
    assert torch.equal(tensor, torch.ones(2, 3))


def test_changing_a_tensor_does_not_change_the_file(model: Path):
    Checkpoint.open(model).read("a").zero_()
    assert torch.equal(Checkpoint.open(model).read("a"), torch.ones(2, 3))


def test_shards_may_be_links_as_in_the_cache_of_the_hub(model: Path):
    snapshot = model / "snapshots" / "0f3e"
    snapshot.mkdir(parents=True)
    for path in list(model.glob("*.*")):
        (snapshot / path.name).symlink_to(path)
    assert torch.equal(Checkpoint.open(snapshot).read("a"), torch.ones(2, 3))


def test_index_wins_over_a_single_file(model: Path):
    save_file({"other": torch.ones(1)}, model / "model.safetensors")
    assert Checkpoint.open(model).tensors.keys() == {"a", "b"}


def test_single_file_wins_over_strangers(tmp_path: Path):
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert Checkpoint.open(tmp_path, need_config=False).tensors.keys() == {"w"}


def test_lone_file_needs_no_config_when_told_so(tmp_path: Path):
    save_file({"w": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    checkpoint = Checkpoint.open(tmp_path, need_config=False)
    assert checkpoint.tensors.keys() == {"w"}
    assert checkpoint.config == {}
    with pytest.raises(CheckpointError, match=r"no config\.json in"):
        Checkpoint.open(tmp_path)


def test_unlisted_tensor_of_a_shard_is_left_out(model: Path):
    save_file(
        {"a": torch.ones(2, 3), "extra": torch.ones(1)}, model / "model-00001-of-00002.safetensors"
    )
    assert Checkpoint.open(model).tensors.keys() == {"a", "b"}


def test_unknown_tensor_is_an_error_with_a_hint(model: Path):
    save_file({"lm_head.weight": torch.ones(1)}, model / "model.safetensors")
    (model / INDEX_NAME).unlink()
    with pytest.raises(
        CheckpointError, match=r"no tensor 'lm_head\.weights' .* Did you mean 'lm_head\.weight'"
    ):
        Checkpoint.open(model).read("lm_head.weights")


def test_file_cut_off_after_opening_is_an_error(model: Path):
    checkpoint = Checkpoint.open(model)
    path = model / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors: 'a' cannot be read any more"
    ):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (ONE, 23, "23 bytes of data, expected 24: it was cut off"),
        (ONE, 25, "25 bytes of data, expected 24: something was added"),
        (b'{"w": ', 24, "Expecting value"),
        (b"\xff\xfe{}", 24, "utf-8"),
        (b"[" * 200_000, 24, "recursion"),
        ([ONE], 24, "JSON list, expected an object"),
        ({"w": 3}, 24, "'w' is 3, expected dtype, shape and data_offsets"),
        (
            {"w": {"dtype": "F32", "shape": [6]}},
            24,
            "'w' is .*expected dtype, shape and data_offsets",
        ),
        (one(dtype="F31"), 24, "'w' has dtype 'F31', expected one of F64, F32"),
        (one(dtype=["F32"]), 24, r"'w' has dtype \['F32'\]"),
        (one(shape=[-2, -3]), 24, r"'w' has shape \[-2, -3\]"),
        (one(shape=[2.0, 3]), 24, r"'w' has shape \[2\.0, 3\]"),
        (one(shape=[True, 6]), 24, r"'w' has shape \[True, 6\]"),
        (one(shape="23"), 24, "'w' has shape '23'"),
        (
            one(shape=[0, 2**63], data_offsets=[0, 0]),
            0,
            r"'w' has shape \[0, 9223372036854775808\]",
        ),
        (
            one(shape=[2, 4]),
            24,
            r"'w' has data_offsets \[0, 24\], expected 32 bytes for F32 of shape \[2, 4\]",
        ),
        (one(dtype="F64"), 24, r"'w' has data_offsets \[0, 24\], expected 48 bytes"),
        (one(data_offsets=[24, 0]), 24, r"'w' has data_offsets \[24, 0\]"),
        (one(data_offsets=[-24, 0]), 24, r"'w' has data_offsets \[-24, 0\]"),
        (one(data_offsets=[0, 24, 48]), 24, r"'w' has data_offsets \[0, 24, 48\], expected two"),
        (one(data_offsets=[8, 32]), 32, "'w' begins at byte 8 of the data, expected 0"),
        (
            {**ONE, "v": {**ONE["w"], "data_offsets": [20, 44]}},
            44,
            "'v' begins at byte 20 of the data, expected 24",
        ),
        (
            {**ONE, "v": {**ONE["w"], "data_offsets": [28, 52]}},
            52,
            "'v' begins at byte 28 of the data, expected 24",
        ),
        ({**ONE, "v": ONE["w"]}, 24, "'v' begins at byte 0 of the data, expected 24"),
        (json.dumps(ONE)[:-1].encode() + b', "w": 1}', 24, "the header has 'w' twice"),
    ],
)
def test_lying_headers_are_refused_by_name(
    tmp_path: Path, header: Any, data_bytes: int, message: str
):
    raw_file(tmp_path / "model.safetensors", header, data_bytes)
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors is damaged.*{message}.*download or write it again",
    ):
        Checkpoint.open(tmp_path, need_config=False)


@pytest.mark.parametrize("header_bytes", [0, 2**63, MAX_HEADER_BYTES + 1, 1000])
def test_impossible_header_lengths_are_refused_before_they_are_read(
    tmp_path: Path, header_bytes: int
):
    path = raw_file(tmp_path / "model.safetensors", ONE, header_bytes=header_bytes)
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors.*header length {header_bytes}, expected 1 to"
    ):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_file_too_short_for_a_header_is_refused(tmp_path: Path, size: int):
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors.*{size} bytes, expected at least the 8"
    ):
        Checkpoint.open(tmp_path, need_config=False)


def test_truth_is_not_refused(tmp_path: Path):
    assert read_header(raw_file(tmp_path / "x.safetensors", ONE)).keys() == {"w"}


@pytest.mark.parametrize(
    "source", ["no such folder", "/no/such/folder", "./absent", "../absent", "absent", "a/b/c"]
)
def test_absent_folder_is_not_taken_for_a_hub_id(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub")
    )
    with pytest.raises(
        CheckpointError, match=f"{source} is not a folder, nor a Hub id like org/name"
    ):
        Checkpoint.open(source)


def test_hub_id_is_fetched_without_pickles_and_code(model: Path, monkeypatch: pytest.MonkeyPatch):
    commit = model.rename(model.with_name("0f3e"))
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoint = Checkpoint.open("org/name-1.5B", "main")
    assert (checkpoint.name, checkpoint.revision, checkpoint.folder) == (
        "org/name-1.5B",
        "0f3e",
        commit,
    )
    assert (asked["repo_id"], asked["revision"]) == ("org/name-1.5B", "main")
    files = ["config.json", "a.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "model.pt", "modeling.py", "onnx/config.json", "README.md"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        files + unwanted,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(chosen) == files


def test_hub_failure_is_one_error_that_names_the_model(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError,
        match=r"org/name is not a folder here and could not be fetched.*no connection",
    ):
        Checkpoint.open("org/name")


@pytest.mark.parametrize("ending", reader._PICKLES)
def test_pickled_weights_are_never_opened(tmp_path: Path, ending: str):
    (tmp_path / f"pytorch_model{ending}").write_bytes(b"cos\nsystem\n")
    with pytest.raises(
        CheckpointError, match=rf"only pickled weights \(pytorch_model{ending}\).*save_pretrained"
    ):
        Checkpoint.open(tmp_path, need_config=False)


def test_folder_without_weights_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"no safetensors file in {tmp_path}"):
        Checkpoint.open(tmp_path, need_config=False)


def test_absent_shard_is_named(model: Path):
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{INDEX_NAME} names the shard model-00002-of-00002\.safetensors"
    ):
        Checkpoint.open(model)


def test_shards_without_index_are_an_unfinished_checkpoint(model: Path):
    (model / INDEX_NAME).unlink()
    with pytest.raises(
        CheckpointError, match=rf"model-00001-of-00002\.safetensors but no {INDEX_NAME}"
    ):
        Checkpoint.open(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"model-00001-of-00002\.safetensors but no {INDEX_NAME}"
    ):
        Checkpoint.open(model)


def test_tensor_that_its_shard_lacks_is_named(model: Path):
    save_file({"other": torch.ones(1)}, model / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"puts 'b' into model-00002-of-00002\.safetensors, which lacks it"
    ):
        Checkpoint.open(model)


def test_tensor_in_two_shards_is_named(model: Path):
    save_file({"b": torch.ones(4), "a": torch.ones(1)}, model / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'a' is in model-00001-of-00002.* and in model-00002-of-00002"
    ):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "x.bin",
    ],
)
def test_index_cannot_lead_out_of_the_folder(model: Path, shard: str):
    (model / "sub").mkdir()
    for place in (model.parent, model / "sub", model):
        save_file({"a": torch.ones(1)}, place / "x.safetensors")
    write_index(model, {"a": shard})
    with pytest.raises(
        CheckpointError, match=rf"{INDEX_NAME} puts 'a' into .*expected the plain name"
    ):
        Checkpoint.open(model)


@pytest.mark.parametrize("weight_map", [None, ["a"], {"a": 1}, {"a": ["x.safetensors"]}])
def test_index_of_the_wrong_form_is_an_error(model: Path, weight_map: Any):
    write_index(model, weight_map)
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}: weight_map must be"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_json_that_is_none_is_named(model: Path, name: str):
    (model / name).write_text("{'single': 'quotes'}")
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        Checkpoint.open(model)


def test_companions_carry_neither_weights_nor_code(model: Path):
    carried = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.model",
    ]
    left = [
        "adapter_config.json",
        "pissa.json",
        "modeling.py",
        "README.md",
        "pytorch_model.bin",
        ".hidden.json",
    ]
    for name in [*carried[2:], carried[0], *left, "pytorch_model.bin.index.json"]:
        (model / name).write_text("{}")
    (model / "folder.json").mkdir()
    assert [path.name for path in Checkpoint.open(model).companions()] == carried
