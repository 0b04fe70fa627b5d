"""One pass of a live model over calibration batches, in which all that methods need of its layers
is gathered.

What lies in memory is bounded: of rows only sums and a sample are kept, a gradient is added up and
freed the moment it is made, and with `scratch` the sums of a matrix's size lie in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.checkpoint.fingerprint import Digests, canonical, fingerprint
from pissa.checkpoint.targets import Target, find_targets, plain_modules
from pissa.errors import InputError, require
from pissa.method import OBSERVED
from pissa.observe.accumulators import Accumulator, Covariance, MeanGradient, Sample, Stream
from pissa.observe.layers import Layers
from pissa.observe.observations import GRADIENT, Observations
from pissa.observe.processes import process
from pissa.randomness import tensor_seed
from pissa.records import versions
from pissa.splits import is_finite

IGNORED = -100
"""The label of tokens without loss."""
Batch = Mapping[str, Any]
Progress = Callable[[int, int | None], None]
"""Called with the batches read, and how many there are if that is known."""


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    needs: str | Iterable[str],
    *,
    targets: str | Iterable[str] = "all-linear",
    components: int = 32,
    inputs: int = 256,
    labelled_only: bool = False,
    tau: float | None = None,
    passes: int = 1,
    seed: int = 0,
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> Observations:
    """Gather what methods need to have seen of a model's layers; the model is afterwards as it was.

    It reads without dropout. Under an initialised `torch.distributed` each process reads batches of
    its own, and all get the result of all.

    Args:
        model: a plain model with its weights in 16 bits or more.
        batches: dicts of tensors as its forward takes them, read once. Where `attention_mask` is 0,
            nothing is seen.
        needs: of covariance, components, gradient (for batches with labels) and inputs.
        targets: see `pissa.attach`. Convolutions and embeddings have gradients only.
        components: most principal components to keep of a layer.
        inputs: most rows to keep of a layer.
        labelled_only: see only tokens that have a label.
        tau: for components alone: read on until each is within this cosine of itself before the
            batch, no further.
        passes: with `tau`, how often the batches are read before that is an error.
        seed: of the sample of inputs.
        scratch: a folder on a disk for the sums of covariances and gradients, 4 bytes an entry;
            None for memory.
        progress: called after every batch.

    Raises:
        InputError: a need, target, batch or layer that cannot be right.
        OutputError: no room in `scratch`.
    """
    asked = {needs} if isinstance(needs, str) else set(needs)
    found = find_targets(model, targets)
    plain: dict[str, Any] = plain_modules(model)
    prefix = getattr(model, "base_model_prefix", "")
    modules = {canonical(target.weight, prefix): plain[target.module] for target in found}
    _check_needs(model, found, asked)
    _check_present(modules, asked)
    _check_numbers(asked, batches, components=components, inputs=inputs, tau=tau, passes=passes)
    place = Path(scratch) if scratch is not None else None

    def make(name: str, columns: int) -> dict[str, Accumulator]:
        makers: dict[str, Callable[[], Accumulator]] = {
            "covariance": lambda: Covariance(columns, place),
            "components": lambda: Stream(components, tau),
            "inputs": lambda: Sample(inputs, columns, tensor_seed(seed, f"{name}/{process()}")),
        }
        return {need: maker() for need, maker in makers.items() if need in asked}

    layers = Layers(make)
    gradients: dict[str, MeanGradient] = {}
    with _borrowed(model), ExitStack() as hooks:
        for target, (name, module) in zip(found, modules.items(), strict=True):
            if asked != {GRADIENT}:
                hooks.callback(layers.watch(name, module))
            if GRADIENT in asked:
                gradients[name] = MeanGradient(target, place)
                hooks.callback(gradients[name].watch(module.weight))
        counts = _read(model, batches, layers, GRADIENT in asked, labelled_only, passes, progress)
    if tau and (left := layers.turning()):
        raise InputError(
            f"the components of {len(left)} layers still turn after {passes} passes, `{left[0]}` first: give more rows "
            f"or passes, fewer components than {components}, or a tau below {tau}"
        )
    counts = layers.combine(counts)
    seen = layers.results([need for need in OBSERVED if need in asked - {GRADIENT}])
    if GRADIENT in asked:
        for mean in gradients.values():
            mean.combine()
        seen[GRADIENT] = {
            name: mean.result(counts["batches"]) for name, mean in gradients.items() if mean.reached
        }
    told = {
        "components": components,
        "inputs": inputs,
        "labelled_only": labelled_only,
        "tau": tau,
        "seed": seed,
    }
    return Observations(
        seen, layers.same, _digests(modules), {**counts, **told, "versions": versions()}
    )


def _read(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Layers,
    backward: bool,
    labelled_only: bool,
    passes: int,
    progress: Progress | None,
) -> dict[str, int]:
    """Let the model read; how many batches, samples and tokens it read."""
    total = len(batches) * passes if isinstance(batches, Sized) else None
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    read, samples, tokens = 0, 0, 0
    for batch in (batch for _ in range(passes) for batch in batches):
        keep = _kept(batch, labelled_only)
        layers.next_batch(keep)
        on_device = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        with torch.set_grad_enabled(backward):
            output = model(**on_device)
            if backward:
                torch.autograd.backward(_loss(output, batch, read))
        layers.next_batch(None)
        read, samples = read + 1, samples + len(next(iter(batch.values())))
        tokens += int(keep.sum()) if keep is not None else 0
        if progress:
            progress(read, total)
        if layers.kept and not layers.turning():
            break
    return {"batches": read, "samples": samples, "tokens": tokens}


def _kept(batch: Batch, labelled_only: bool) -> Tensor | None:
    """Which tokens of a batch count, [samples, tokens]; None for a batch without tokens."""
    mask, ids, labels = (batch.get(key) for key in ("attention_mask", "input_ids", "labels"))
    keep = (
        mask.bool()
        if mask is not None
        else None
        if ids is None
        else torch.ones_like(ids, dtype=torch.bool)
    )
    if keep is not None and keep.ndim != 2:
        raise InputError(
            f"attention_mask is {list(keep.shape)}, expected [samples, tokens] with 0 for padding"
        )
    if not labelled_only:
        return keep
    if keep is None or labels is None or labels.shape != keep.shape:
        raise InputError(
            "labelled_only needs a label for each token, `labels` of the shape of `input_ids`"
        )
    counts: Tensor = keep & (labels != IGNORED)
    return counts


def _loss(output: Any, batch: Batch, index: int) -> Tensor:
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if given is None:
        raise InputError(
            f"the gradient needs a loss, and the model gave none for batch {index} of {', '.join(batch)}: add `labels`"
        )
    loss: Tensor = given
    if not is_finite(loss.detach()):
        raise InputError(
            f"the loss of batch {index} is {loss.item()}: look at its rows, or load the model in float32"
        )
    return loss


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """The model reading, without dropout, no parameter training; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    named = partial(model.named_parameters, remove_duplicate=False)
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in named()}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name, parameter in named():  # other tensors than before where the model is offloaded
            trains, parameter.grad = before[name]
            parameter.requires_grad_(trains)


def _check_needs(model: nn.Module, found: list[Target], asked: set[str]) -> None:
    if not asked or not asked <= set(OBSERVED):
        raise InputError(
            f"needs are {', '.join(sorted(asked)) or 'none'}, expected some of {', '.join(OBSERVED)}"
        )
    if asked == {GRADIENT}:
        return
    odd = next((target for target in found if target.kind in ("embedding", "conv2d")), None)
    if odd:
        raise InputError(
            f"`{odd.module}` is of kind {odd.kind}, of which only the gradient is seen: leave it out of the targets"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} reads two texts, whose paddings cannot be told apart at a layer: of such a model "
            "only the gradient is seen"
        )


def _check_present(modules: dict[str, Any], asked: set[str]) -> None:
    for name, module in modules.items():
        if module.weight.is_meta and (GRADIENT in asked or not hasattr(module, "_hf_hook")):
            raise InputError(
                f"`{name}` is not in memory but on the meta device: load the model with its weights. Of an offloaded "
                "model all but the gradient is seen"
            )


def _digests(modules: dict[str, Any]) -> dict[str, Digests]:
    """The digests of the layers' weights; offloaded ones are fetched one at a time."""
    base = fingerprint(
        {name: module.weight.data for name, module in modules.items() if not module.weight.is_meta}
    )
    for name in [name for name in modules if name not in base]:
        with require("accelerate.utils", "train").align_module_device(modules[name]):
            base |= fingerprint({name: modules[name].weight.data})
    return base


def _check_numbers(
    asked: set[str],
    batches: object,
    *,
    components: int,
    inputs: int,
    tau: float | None,
    passes: int,
) -> None:
    for what, number in {"components": components, "inputs": inputs, "passes": passes}.items():
        if number < 1:
            raise InputError(f"{what} is {number}, expected 1 or more")
    if tau is not None and not 0 < tau < 1:
        raise InputError(f"tau is {tau}, expected a cosine between 0 and 1")
    if tau is not None and asked != {"components"}:
        raise InputError(
            "tau says when components are seen well enough; other needs read all batches: observe them apart"
        )
    if passes > 1 and (tau is None or isinstance(batches, Iterator)):
        raise InputError(
            "several passes need a tau to stop at, and batches that can be read again, such as a list"
        )
