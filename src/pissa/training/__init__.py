"""Data, supervised fine-tuning and classification: thin, around transformers and TRL."""

from pissa.training.run import train

__all__ = ["train"]
