"""What kernels, packing, early stopping and reports ask of the settings and the machine, before anything is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
)

from pissa.config import TrainSettings
from pissa.errors import MissingExtraError, did_you_mean

_PACKAGES = {
    "azure_ml": "azureml-core mlflow",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
}
"""Of the reports whose package has another name."""


def mistakes(settings: TrainSettings) -> list[str]:
    """What cannot be right, one line each."""
    found = []
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.packing and settings.task != "language":
        found.append(
            f"packing: got true with {settings.task}, which has one label a row, expected false"
        )
    if settings.early_stopping and not (
        (settings.eval_data or settings.eval_size) and settings.eval_steps
    ):
        found.append(
            f"early_stopping: got {settings.early_stopping}, expected beside it eval_steps, and eval_data or "
            "eval_size: it counts evaluations during training"
        )
    if settings.attn_implementation.startswith("flash") and on_cpu:
        found.append(
            f"attn_implementation: got {settings.attn_implementation}, expected sdpa or eager without a GPU"
        )
    if settings.bf16 and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(
            "bf16: got true, expected false on this GPU, which does not compute in bfloat16"
        )
    for name in reports(settings):
        if name != "all" and name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            found.append(f"report_to: got {name!r}, expected none, all, or some of {known}.{near}")
    if settings.liger and on_cpu and importlib.util.find_spec("liger_kernel"):
        found.append("liger: got true, expected false without a GPU: its kernels are Triton's")
    return found


def require_packages(settings: TrainSettings) -> None:
    """Refuse settings whose packages are not there.

    Raises:
        MissingExtraError: with the pip line.
    """
    integrations: Callable[[], list[str]] = get_available_reporting_integrations
    there = integrations()
    for name in reports(settings):
        # flyte is not among those that transformers looks for
        if (
            name != "all"
            and name not in there
            and not importlib.util.find_spec(_PACKAGES.get(name, name).split()[0])
        ):
            raise MissingExtraError(
                f"report_to {name} needs its package: pip install {_PACKAGES.get(name, name)}"
            )
    if settings.liger and not importlib.util.find_spec("liger_kernel"):
        raise MissingExtraError("liger needs its package, and a GPU: pip install liger-kernel")
    kernel = settings.attn_implementation
    if kernel == "flash_attention_2" and not (
        is_flash_attn_2_available() or is_kernels_available()
    ):
        raise MissingExtraError(
            f"{kernel} needs its package: pip install flash-attn --no-build-isolation"
        )
    if kernel == "flash_attention_3" and not (
        is_flash_attn_3_available() or is_kernels_available()
    ):
        raise MissingExtraError(f"{kernel} needs its package: pip install kernels")


def reports(settings: TrainSettings) -> list[str]:
    """The names in `report_to`, none for "none"."""
    names = [settings.report_to] if isinstance(settings.report_to, str) else settings.report_to
    return [name for name in names if name != "none"]
