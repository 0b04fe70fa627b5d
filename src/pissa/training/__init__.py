"""Data, supervised fine-tuning and classification: thin, around transformers and TRL."""

from pissa.training.quiet import quiet
from pissa.training.run import train

__all__ = ["quiet", "train"]
