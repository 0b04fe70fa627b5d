"""Attach a method's splits to a model: all weights are checked and split first, then the model is wrapped by peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pissa.adapters import quantized, twins
from pissa.adapters.adaptation import Adaptation, refuse_untrained
from pissa.adapters.factors import Starts
from pissa.adapters.forms import Form
from pissa.adapters.plain import whole
from pissa.adapters.splitting import given_observations
from pissa.checkpoint.fingerprint import canonical, combined, fingerprint, model_tensors
from pissa.checkpoint.targets import Target, find_targets, head_modules, plain_modules, short_names
from pissa.checks import chosen_device, scale_of
from pissa.errors import InputError, WrongBaseError
from pissa.method import Method
from pissa.observe import Observations
from pissa.presets import choose
from pissa.records import Base, Layer, Recipe, Record, versions
from pissa.splits import Factors
from pissa.untyped import Json, Options, PeftLayer


@dataclass
class Attachment:
    """What an adapter on a live model started from; `save` writes it down.

    Attributes:
        adaptation: how the weights were split and how what trains lives on their layers.
        record: of kind "state".
        targets: the weights.
        split: the model's weights are what the start left of them already.
    """

    adaptation: Adaptation
    record: Record
    targets: list[Target]
    split: bool = False

    @property
    def recipe(self) -> Recipe:
        """How the weights were split."""
        return self.adaptation.recipe


def attach(
    model: nn.Module,
    method: str | Method = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    targets: str | Iterable[str] = "all-linear",
    base: str = "keep",
    svd: str | float = "fast",
    seed: int = 0,
    modules_to_save: Iterable[str] | None = None,
    adapter_name: str = "default",
    observations: Observations | str | Path | None = None,
    options: Options | None = None,
    device: str | None = None,
) -> PeftModel:
    """Split a model's weights and return it as a `peft.PeftModel`, ready to train.

    Args:
        model: a transformers (or any torch) model with weights in 16 bits or more, or a PeftModel
            made by `attach`, which gets one more adapter.
        method: a name listed by `pissa methods`, or the method itself.
        rank: 1 to min(out, in) of the smallest target.
        alpha: above 0; by default `rank`, which makes the scale 1.
        targets: "all-linear", module names or endings, or a regular expression over full names.
        base: "keep" (the weights stay, the drift trains) or "residual" (the paper's form: the
            weights become the residual; `unload()` and `delete_adapter()` put the kept originals
            back).
        svd: "fast", "exact" (certified to 1e-5) or a tolerance to certify.
        seed: fixes every random number together with the tensors' names.
        modules_to_save: modules that train whole; by default the head of a classification model.
        adapter_name: peft's name for the adapter.
        observations: what was seen of this model on calibration rows, for the methods that need it;
            or the file of it.
        options: the method's own settings by name.
        device: where the algebra runs, one weight at a time; by default where each weight lies.

    Raises:
        InputError: anything that cannot be right, naming the tensor; the model is untouched then.
        WrongBaseError: the model is a residual already, or the observations are of another model.
    """
    if base not in ("keep", "residual"):
        raise InputError(f"base is {base!r}, expected 'keep' or 'residual'")
    chosen_device(device)
    choice = choose(method)
    chosen = choice.method
    observations = given_observations(chosen, observations)
    if choice.quant:
        raise InputError(
            f"{method} quantises what does not train, which is done on files: "
            f"pissa.decompose(MODEL, OUT, {method!r}), then pissa.load(from_pretrained(OUT), OUT)"
        )
    refuse_untrained(chosen)
    inner = plain_model(model)
    _refuse_residual(inner)
    found = find_targets(inner, targets)
    heads = sorted(modules_to_save) if modules_to_save is not None else head_modules(inner)
    recipe = Recipe(
        method=chosen.name,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        svd=svd,
        seed=seed,
        base_form=base,
        targets={target.module: target.kind for target in found},
        options=chosen.checked(options),
    )
    scale_of(alpha, rank)
    adaptation = Adaptation.of(recipe, chosen)
    adaptation.refuse_unfit(found)
    if observations:
        observations.check(model_tensors(inner))
    adaptation, starts, layers = split_model(inner, found, adaptation, observations, device)
    digests = fingerprint(model_tensors(inner, skip=heads))
    notes = {"observed": observations.facts} if observations else {}
    made_of = base_of(inner, digests)
    record = Record("state", adaptation.recipe, made_of, layers, notes=notes, versions=versions())
    found = [target for target in found if target.module in adaptation.recipe.targets]
    return wrap(model, Attachment(adaptation, record, found), starts, heads, adapter_name)


def split_model(
    model: nn.Module,
    targets: list[Target],
    adaptation: Adaptation,
    observations: Observations | None = None,
    device: str | None = None,
) -> tuple[Adaptation, dict[str, Factors], list[Layer]]:
    """The start of every target and what it keeps; the model is only read.

    Returns:
        The adaptation with the layers' own ranks, starts by module, and a line for each split.
    """
    modules: dict[str, Any] = plain_modules(model)
    prefix = getattr(model, "base_model_prefix", "")

    def matrix(target: Target) -> Tensor:
        weight = modules[target.module].weight.data
        return target.to_matrix(weight if device is None or weight.is_meta else weight.to(device))

    def seen(target: Target) -> Any:  # what the method needs, see Adaptation.seen
        return adaptation.seen(observations, canonical(target.weight, prefix))

    weights = ((target, matrix(target)) for target in targets)
    settled = adaptation.allotted(weights, seen).at_full_rank(targets)
    starts, layers = {}, []
    for target in targets:
        if target.module not in settled.recipe.targets:
            continue
        weight, name, rank = matrix(target), target.weight, settled.recipe.rank_of(target.module)
        split = settled.split(weight, name, weight.dtype, rank=rank, observed=seen(target))
        starts[target.module] = split.start.on(modules[target.module].weight.device)
        layers.append(settled.form.describe(name, split, weight.dtype))
    return settled, starts, layers


def wrap(
    model: nn.Module,
    attachment: Attachment,
    starts: Starts,
    modules_to_save: list[str],
    adapter: str,
    put: Callable[[PeftLayer, str, Factors], None] | None = None,
) -> PeftModel:
    """Put peft's layers around the targets, and adapters in the attachment's form at their start.

    Args:
        model: plain, or with adapters already.
        attachment: what the adapter starts from.
        starts: by module.
        modules_to_save: modules that train whole.
        adapter: peft's name for it.
        put: called for each layer in the place of the form's `install`.
    """
    recipe, form = attachment.recipe, attachment.adaptation.form
    _refuse_neighbours(model, adapter, form)
    inner = plain_model(model)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=whole(recipe.alpha),  # type: ignore[arg-type]
        rank_pattern=dict(recipe.ranks),
        alpha_pattern={module: whole(recipe.scale * rank) for module, rank in recipe.ranks.items()},
        target_modules=short_names(attachment.targets, inner),
        modules_to_save=modules_to_save or None,
        fan_in_fan_out=any(target.kind == "conv1d" for target in attachment.targets),
        task_type=_task_type(inner),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft draws a start that is overwritten here, and warns of mixed Conv1D and Linear targets.
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=adapter)
    quantized.keep_precision(wrapped)
    for module, layer in adapter_layers(wrapped, attachment.targets).items():
        quantized.keep_codes(layer)
        if put is None:
            form.install(layer, adapter, starts[module], split=attachment.split)
        else:
            put(layer, adapter, starts[module])
    form.tell_stock_tools(wrapped, adapter)
    twins.offer(wrapped)
    attachments_of(wrapped)[adapter] = attachment
    return wrapped


def attachments_of(model: Any) -> dict[str, Attachment]:
    """What `attach` and `load` put on a PeftModel, by adapter name; kept on the model itself."""
    if not hasattr(model, "pissa_attachments"):
        model.pissa_attachments = {}
    attachments: dict[str, Attachment] = model.pissa_attachments
    return attachments


def adapter_layers(model: PeftModel, targets: list[Target]) -> dict[str, PeftLayer]:
    """The peft layer of each target by module path."""
    inner = model.get_base_model()
    return {target.module: inner.get_submodule(target.module) for target in targets}


def base_of(model: nn.Module, digests: dict[str, dict[str, str]]) -> Base:
    """The model's name, revision and fingerprint."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return Base(name, getattr(config, "_commit_hash", None), combined(digests), digests)


def plain_model(model: nn.Module) -> nn.Module:
    """The model that peft wrapped, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def residual_note(model: nn.Module) -> Json | None:
    """What a decomposed folder's `config.json` says of the model, if it is a residual."""
    note = getattr(getattr(model, "config", None), "pissa", None)
    return note if isinstance(note, dict) and note.get("kind") == "residual" else None


def is_residual(model: nn.Module) -> bool:
    """Whether the model's weights are a residual, right only with the start beside them."""
    return residual_note(model) is not None


def adaptation_of(model: PeftModel, adapter_name: str = "default") -> Adaptation:
    """How the adapter of an attached model was started and lives on its layers."""
    return attachments_of(model)[adapter_name].adaptation


def _refuse_neighbours(model: nn.Module, adapter: str, form: Form) -> None:
    """What the adapters that a model has already do not bear."""
    present = list(model.peft_config) if isinstance(model, PeftModel) else []
    if adapter in present:
        raise InputError(
            f"adapter {adapter!r} exists on this model: choose another adapter_name, or delete it first"
        )
    form.refuse_neighbours(present)


def _refuse_residual(model: nn.Module) -> None:
    note = residual_note(model)
    if note:
        raise WrongBaseError(
            f"this model is the residual of {note.get('base')!r} ({note.get('method')}, rank {note.get('rank')}), not "
            "a base model: use pissa.load(model, FOLDER) with the folder it came from, or attach to the original base"
        )


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)
