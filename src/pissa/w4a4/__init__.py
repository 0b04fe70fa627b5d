"""Models that compute in 4 bits, weights and activations (SVDQuant): on disk, in memory, and as ordinary ones."""

from pissa.w4a4.export import export_dense
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.loading import load_w4a4
from pissa.w4a4.model import quantise_model
from pissa.w4a4.writing import svdquant

__all__ = ["W4A4Linear", "export_dense", "load_w4a4", "quantise_model", "svdquant"]
