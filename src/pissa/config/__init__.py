"""What a training run is told: the settings, and how they are read."""

from pissa.config.reading import ALIASES, config_error, load_settings
from pissa.config.settings import KEYS, TrainSettings, default_of

__all__ = ["ALIASES", "KEYS", "TrainSettings", "config_error", "default_of", "load_settings"]
