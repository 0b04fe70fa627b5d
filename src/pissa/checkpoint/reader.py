"""Reading a safetensors checkpoint one tensor at a time; every header is checked before safetensors sees the file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pissa.checkpoint.layout import INDEX_NAME, SINGLE_NAME, TensorInfo, read_header
from pissa.checkpoint.output import read_json
from pissa.errors import CheckpointError, did_you_mean
from pissa.untyped import Json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CARRIED = (".json", ".txt", ".model", ".jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass
class Checkpoint:
    """A folder of safetensors files, read one tensor at a time.

    Attributes:
        folder: Where the files are.
        name: The folder or Hub id as it was asked for.
        revision: The commit for a Hub id; as given for a folder.
        config: The content of `config.json`, or empty where there is none.
        tensors: What is in the files, in their order on disk.
    """

    folder: Path
    name: str
    revision: str | None
    config: Json
    tensors: dict[str, TensorInfo]
    _latest: tuple[str, Any] = field(default=("", None), init=False, repr=False)

    @classmethod
    def open(
        cls, source: str | Path, revision: str | None = None, *, need_config: bool = True
    ) -> Checkpoint:
        """Open a folder, or download a model of the Hub; no tensor is read and nothing is ever
        unpickled.

        The weights are the shards that `model.safetensors.index.json` names, else
        `model.safetensors`, else the only safetensors file there. A tensor that the index does not
        name is left out, as the index says what the model is.

        Args:
            source: An existing folder, else a Hub id "org/name".
            revision: Branch, tag or commit on the Hub; only noted for a folder.
            need_config: Insist on a `config.json`; False for adapters and training states.

        Raises:
            CheckpointError: Not a readable, safe, complete checkpoint.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), revision)
            revision = folder.name  # the cache names a snapshot by its commit
        config_path = folder / "config.json"
        if need_config and not config_path.is_file():
            raise CheckpointError(
                f"no config.json in {folder}: give the folder of a whole model, not of its weights alone"
            )
        config = read_json(config_path) if config_path.is_file() else {}
        return cls(folder, str(source), revision, config, _read_tensors(folder))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: memory is only borrowed from the page cache.

        Raises:
            CheckpointError: No tensor of this name, or the file changed since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"no tensor {name!r} in {self.folder}.{did_you_mean(name, self.tensors)}"
            )
        try:
            shard, file = self._latest  # taken once: another thread may put another shard there
            if shard != info.shard:
                file = safe_open(self.folder / info.shard, framework="pt", device="cpu")
                self._latest = (info.shard, file)
            tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder / info.shard}: {name!r} cannot be read any more ({error}): has the file changed?"
            ) from error
        return tensor

    def companions(self) -> list[Path]:
        """Files that belong to the model and carry no weights and no code: config, tokenizer, chat
        template.

        Only plain files of the folder itself with the endings json, txt, model and jinja; an index,
        adapter settings and `pissa.json` describe weights that stay behind, so they stay too.
        """
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and path.suffix in _CARRIED
            and not path.name.startswith((".", "adapter_"))
            and not path.name.endswith(".index.json")
            and path.name != "pissa.json"
        )


def _download(source: str, revision: str | None) -> Path:
    """Fetch the plain files of a Hub model; no pickles, no code, no subfolders."""
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source} is not a folder, nor a Hub id like org/name: check the path"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *(f"*{ending}" for ending in _CARRIED)]
    try:
        return Path(
            snapshot_download(
                source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # the Hub client raises its own errors, those of httpx and OSError
        raise CheckpointError(
            f"{source} is not a folder here and could not be fetched from the Hub ({error}): check the name, "
            "the revision, the network, and your access to the model"
        ) from error


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return read_header(folder / _only_file(folder))
    shard_of = _read_index(index_path)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{index_path} names the shard {shard}, which is absent: finish the download"
            )
        for name, info in read_header(folder / shard).items():
            if name not in shard_of:
                continue
            if shard_of[name] != shard:  # tools differ in which of the two they load
                raise CheckpointError(
                    f"{folder}: {name!r} is in {shard_of[name]} and in {shard}: write the model again"
                )
            tensors[name] = info
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index_path} puts {name!r} into {shard}, which lacks it: fetch both again"
            )
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor. A shard must be a plain file name; links are fine, the Hub's cache is made of them."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) for shard in shard_of.values()
    ):
        raise CheckpointError(
            f"{path}: weight_map must be an object of tensor names and file names: fetch it again"
        )
    for name, shard in shard_of.items():
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(
                f"{path} puts {name!r} into {shard!r}, expected the plain name of a safetensors file beside it: "
                "do not use this checkpoint unless you trust its source"
            )
    return shard_of


def _only_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if SINGLE_NAME in found:
        return SINGLE_NAME
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder} has no safetensors, only pickled weights ({pickles[0]}), which can run code and are never "
                "opened here: load it with transformers on a machine you can afford to lose, and save it again with "
                "model.save_pretrained(folder), which writes safetensors"
            )
        raise CheckpointError(
            f"no safetensors file in {folder} (pickled weights such as .bin are never fetched or opened): "
            f"give a folder or model that has {SINGLE_NAME}"
        )
    if len(found) > 1 or re.search(r"-\d+-of-\d+\.", found[0]):
        raise CheckpointError(
            f"{folder} has {found[0]} but no {INDEX_NAME} to say what belongs together: fetch it again"
        )
    return found[0]
