"""The model that a plan is for: its config, its dtype, and the headers of its weights where they are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from pissa.checkpoint.layout import DTYPES, TensorInfo
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton
from pissa.config import TrainSettings
from pissa.errors import CheckpointError, InputError
from pissa.surgery.packing import is_residual
from pissa.untyped import Json

CLASSES = {
    "language": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "regression": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
"""The class that training loads, by task and type of model."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    """A model without its weights.

    Attributes:
        folder: holds `config.json`.
        config: its content.
        dtype: that training loads it in.
        tensors: what the headers say; empty where only the config is at hand.
    """

    folder: Path
    config: Json
    dtype: torch.dtype
    tensors: dict[str, TensorInfo]

    @property
    def decomposed(self) -> bool:
        """Whether it is the residual of a decomposition."""
        return is_residual(self.config)


def open_source(settings: TrainSettings) -> Source:
    """Read the config, and the headers of the weights if they are there; of a Hub model the config
    alone.

    Raises:
        CheckpointError: no config, or weights that training would refuse.
        InputError: a model in few bits that pissa did not make.
    """
    folder = Path(settings.model)
    if not folder.exists():
        folder = _config_from_hub(settings)
    elif not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no config.json in {folder}: give a model's folder; its config alone is enough to plan"
        )
    whole = any(found for pattern in WEIGHTS for found in folder.glob(pattern))
    tensors = Checkpoint.open(folder).tensors if whole else {}
    config = read_json(folder / "config.json")
    if config.get("quantization_config") and not is_residual(config):
        raise InputError(
            f"{settings.model} is quantised already: start from the 16-bit model it was made from"
        )
    return Source(folder, config, _dtype(settings, config, tensors), tensors)


def skeleton(source: Source, settings: TrainSettings, classes: int) -> nn.Module:
    """The model as training loads it, with the head of its task, on the meta device.

    Args:
        source: its config.
        settings: of the run.
        classes: of a new classification head.

    Raises:
        CheckpointError: transformers has no such model.
    """
    kind, config = source.config.get("model_type", ""), dict(source.config)
    name = CLASSES[settings.task].get(kind)
    own = (config.get("architectures") or [""])[0]
    if config.get("auto_map") or (settings.task == "language" and own == name):
        model = build_skeleton(source.folder, trust_remote_code=settings.trust_remote_code)
    elif name is None:
        raise CheckpointError(
            f"{settings.model} is a {kind or 'nameless'} model, which has no {settings.task} head"
        )
    else:
        if settings.task != "language":
            config = {
                key: value for key, value in config.items() if key not in ("id2label", "label2id")
            }
            config["num_labels"] = classes if settings.task == "classification" else 1
        model = build_skeleton(source.folder, config={**config, "architectures": [name]})
    return model.to(source.dtype)


def _config_from_hub(settings: TrainSettings) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(settings.model, "config.json", revision=settings.revision)
        ).parent
    except Exception as error:  # the Hub client raises its own errors, those of httpx and OSError
        raise CheckpointError(
            f"{settings.model} is not a folder here and its config cannot be had from the Hub ({error}): "
            "give a folder with a config.json, which is enough to plan"
        ) from error


def _dtype(settings: TrainSettings, config: Json, tensors: dict[str, TensorInfo]) -> torch.dtype:
    """As asked for, else as the config says, else that of the first floating-point weight."""
    asked = (
        settings.dtype
        if settings.dtype != "auto"
        else config.get("dtype") or config.get("torch_dtype")
    )
    if asked:
        named: torch.dtype = getattr(torch, str(asked).removeprefix("torch."))
        return named
    stored = [info.dtype for info in tensors.values()] or _dtypes_on_hub(settings)
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def _dtypes_on_hub(settings: TrainSettings) -> list[torch.dtype]:
    """From the headers of the files on the Hub; none for a folder or where they cannot be had."""
    if Path(settings.model).exists():
        return []
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(
            settings.model, revision=settings.revision
        ).files_metadata.values()
    except Exception:  # as above; transformers' default is right for most models without a dtype
        return []
    return [
        DTYPES[tensor.dtype]
        for file in files
        for tensor in file.tensors.values()
        if tensor.dtype in DTYPES
    ]
