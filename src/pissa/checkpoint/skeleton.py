"""The model without its weights: which checkpoint tensor is which parameter, read from the model
itself.

Built on the meta device, so prefixes, tied weights, GPT-2's transposed layers and everything that
is not a plain linear layer are known, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pissa.checkpoint.output import read_json
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError
from pissa.untyped import Json


def build_skeleton(
    folder: Path, *, config: Json | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The transformers model that `config.json` names, on the meta device, tied as when loaded.

    Args:
        folder: holds `config.json`.
        config: to be used instead of the folder's, for a model with another head.
        trust_remote_code: whether the folder's own code may run.

    Raises:
        CheckpointError: an architecture that needs remote code, or settings that transformers
            cannot build.
    """
    import transformers

    content = config or read_json(folder / "config.json")
    remote = content.get("auto_map")
    if remote and not trust_remote_code:
        raise CheckpointError(
            f"{folder}/config.json asks for code from the model's own repository ({next(iter(remote.values()))}), "
            "which is not run unless asked: read that code, then pass --trust-remote-code"
        )
    try:
        if config is None:
            settings = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        else:
            settings = transformers.AutoConfig.for_model(**config)
        model_class = getattr(transformers, (content.get("architectures") or [""])[0], None)
        build: Callable[..., transformers.PreTrainedModel]
        if model_class is not None:
            build = model_class
        elif remote:
            build = partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=True)
        else:
            build = transformers.AutoModel.from_config
        with torch.device("meta"):
            model = build(settings)
    # Every architecture checks its settings in its own way, or stumbles over them
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot build this model ({error})"
        ) from error
    model.tie_weights()
    skeleton: nn.Module = model  # whose own `eval` has no types
    return skeleton.eval()


def parameter_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Each checkpoint tensor's parameter (or buffer) in the model, for those that have one.

    A checkpoint may carry the base model's prefix (`model.layers...`) or not (`layers...`),
    whichever class wrote it.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {
        n for n, _ in model.named_buffers()
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for name in stored:
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in known:
                found[name] = candidate
                break
    return found


def stored_targets(
    targets: list[Target], parameters: dict[str, str], folder: Path
) -> dict[str, Target]:
    """The targets by the name of their tensor in the checkpoint.

    Raises:
        CheckpointError: a target whose weight is not stored under a name that can be told.
    """
    stored = {parameter: name for name, parameter in parameters.items()}
    missing = [target.weight for target in targets if target.weight not in stored]
    if missing:
        raise CheckpointError(
            f"{folder} holds no tensor for `{missing[0]}` ({len(missing)} of {len(targets)} targets): the checkpoint "
            "stores it fused or renamed. Load the model with transformers and save it again with save_pretrained"
        )
    return {stored[target.weight]: target for target in targets}
