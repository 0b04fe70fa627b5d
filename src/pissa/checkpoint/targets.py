"""Which weights of a model are split, and how each one reads as a matrix [out, in].

Works on any torch model, also on one without weights (the meta device), so that a checkpoint's
targets are known from the model's own modules rather than guessed from names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pissa.errors import InputError, did_you_mean

ALL_LINEAR = "all-linear"
QUANTISED = ("Linear4bit", "Linear8bitLt", "Params4bit", "Int8Params")


@dataclass(frozen=True)
class Target:
    """One weight to split.

    Attributes:
        module: the module's path in the model, `model.layers.0.self_attn.q_proj`.
        kind: linear, conv1d (GPT-2's transposed linear), embedding or conv2d.
        shape: of the stored weight.
    """

    module: str
    kind: str
    shape: tuple[int, ...]

    @property
    def weight(self) -> str:
        """The parameter's name."""
        return f"{self.module}.weight"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of the weight as a matrix."""
        if self.kind in ("conv1d", "embedding"):
            return self.shape[1], self.shape[0]
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return self.shape[0], columns

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as [out, in]; a view where possible."""
        if self.kind in ("conv1d", "embedding"):
            return weight.T
        return weight.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the stored weight's shape."""
        if self.kind in ("conv1d", "embedding"):
            return matrix.T.contiguous()
        return matrix.reshape(self.shape)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name as if no adapter were attached: wrappers give way to what they wrap."""
    plain: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in wrapped):
            continue
        plain[name] = unwrapped(module)
        if plain[name] is not module:
            wrapped.append(f"{name}.")
    return plain


def unwrapped(module: nn.Module) -> nn.Module:
    """The base's own layer inside an adapter's wrapper, or the module itself."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return inner if isinstance(inner, nn.Module) else module


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module that can be a target, else None."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer holds its weight in few bits."""
    return (
        type(module).__name__ in QUANTISED
        or type(getattr(module, "weight", None)).__name__ in QUANTISED
    )


def target_of(name: str, module: nn.Module) -> Target:
    """A module's weight as a target; a quantised one as the matrix it stands for.

    Args:
        name: the module's path.
        module: of a kind that can be a target.

    Raises:
        InputError: it is of no such kind.
    """
    return Target(name, _target_kind(name, module), _stored_shape(module))


def find_targets(
    model: nn.Module, targets: str | Iterable[str] = ALL_LINEAR, *, quantised: bool = False
) -> list[Target]:
    """The weights that `targets` names, in the model's order.

    Args:
        model: any torch module, weights on any device or on none.
        targets: "all-linear" (every linear layer but the output head and a classification head),
            module names or their last parts (`q_proj`, `layers.0.mlp`-style endings), or one
            string: a regular expression over full names if it is not itself a name.
        quantised: whether a weight in few bits may be among them.

    Raises:
        InputError: nothing matched, a tied weight, fused expert weights, a quantised weight, a
            grouped convolution.
    """
    everything = targets == ALL_LINEAR
    modules = plain_modules(model)
    heads = _heads(model, modules)
    attention_outputs = {
        f"{name}.out_proj" for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)
    }
    asked = [targets] if isinstance(targets, str) else list(targets)
    found: list[Target] = []
    hit: set[str] = set()
    for name, module in modules.items():
        if everything:
            _refuse_experts(name, module)
            chosen = (
                kind_of(module) in ("linear", "conv1d")
                and name not in heads
                and name not in attention_outputs
            )
        else:
            matches = {pattern for pattern in asked if _matches(pattern, name)}
            chosen = bool(matches)
            hit |= matches
        if not chosen:
            continue
        kind = _target_kind(name, module)
        if name in attention_outputs:
            raise InputError(
                f"target `{name}` belongs to nn.MultiheadAttention, which bypasses adapters: leave it out"
            )
        _refuse_unsupported(name, module, quantised)
        found.append(Target(name, kind, _stored_shape(module)))
    missing = [pattern for pattern in asked if pattern not in hit] if not everything else []
    if missing or not found:
        raise InputError(_no_match(missing or asked, modules))
    _refuse_tied(modules, found)
    return found


def short_names(targets: list[Target], model: nn.Module) -> list[str]:
    """The shortest module endings that match exactly these targets in peft's sense, for `target_modules`."""
    names = {target.module for target in targets}
    every = plain_modules(model)
    endings = sorted({name.rpartition(".")[2] for name in names})
    matched = {name for name in every if any(name == e or name.endswith(f".{e}") for e in endings)}
    return endings if matched == names else sorted(names)


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return not re.fullmatch(r"[\w.\-]+", pattern) and re.fullmatch(pattern, name) is not None


def head_modules(model: nn.Module) -> list[str]:
    """What a classification model puts beside its base model: new, so it trains whole and is no part of the base."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]


def _heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Modules that "all-linear" leaves out: the output head and a classification head."""
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output else None
    output = unwrapped(output) if isinstance(output, nn.Module) else None
    new = tuple(head_modules(model))
    return {
        name
        for name, module in modules.items()
        if module is output or name in new or name.startswith(tuple(f"{head}." for head in new))
    }


def _target_kind(name: str, module: nn.Module) -> str:
    """Its kind; InputError where it has none."""
    kind = kind_of(module)
    if kind is None:
        _refuse_experts(name, module)
        raise InputError(
            f"target `{name}` is a {type(module).__name__}, expected Linear, Conv1D, Embedding or "
            "Conv2d: leave it out of --targets"
        )
    return kind


def _stored_shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight; of a quantized one, whose stored shape is another, that of its matrix."""
    layer: Any = module  # which attributes it has depends on its kind
    if is_quantised(module):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def _refuse_unsupported(name: str, module: nn.Module, quantised: bool) -> None:
    weight: Any = module.weight
    if not quantised and (is_quantised(module) or not weight.dtype.is_floating_point):
        raise InputError(
            f"`{name}` is quantised ({type(module).__name__}), and what it lost cannot be split off any more: start "
            "from the 16-bit model, which `pissa decompose --quant nf4` splits and quantises in one go"
        )
    plain = {"groups": 1, "dilation": (1, 1), "padding_mode": "zeros"}
    if isinstance(module, nn.Conv2d) and any(
        getattr(module, key) != value for key, value in plain.items()
    ):
        got = ", ".join(f"{key}={getattr(module, key)}" for key in plain)
        raise InputError(
            f"`{name}` is a convolution with {got}; peft's adapters need groups 1, dilation 1 and zero padding: "
            "leave it out of --targets"
        )


def _refuse_experts(name: str, module: nn.Module) -> None:
    fused = [
        f"{name}.{key}" for key, value in module.named_parameters(recurse=False) if value.ndim == 3
    ]
    if (
        fused
        and kind_of(module) is None
        and not isinstance(module, (nn.Conv1d, nn.MultiheadAttention))
    ):
        raise InputError(
            f"`{fused[0]}` holds the fused weights of several experts (3-D), which cannot be split yet: "
            "name the other layers in --targets, for example q_proj,k_proj,v_proj,o_proj"
        )


def _refuse_tied(modules: dict[str, nn.Module], targets: list[Target]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for target in targets:
        names = owners[id(modules[target.module].weight)]
        if len(names) > 1:
            other = next(name for name in names if name != target.weight)
            raise InputError(
                f"`{target.weight}` is tied to `{other}`: splitting one would change the other. "
                "Leave it out of --targets, or untie the model first (tie_word_embeddings=False and a copied weight)"
            )


def _no_match(missing: list[str], modules: dict[str, nn.Module]) -> str:
    known = sorted(
        {name.rpartition(".")[2] for name, module in modules.items() if kind_of(module)} - {""}
    )
    return (
        f"no module matches {', '.join(map(repr, missing))}.{did_you_mean(missing[0], known)} "
        f"This model's layers are: {', '.join(known) or 'none that can be split'}"
    )
