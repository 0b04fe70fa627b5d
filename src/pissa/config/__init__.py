"""What a training run is told: the settings, and how they are read."""

from pissa.config.reading import config_error, load_settings
from pissa.config.settings import KEYS, TrainSettings, default_of
from pissa.config.spellings import ALIASES

__all__ = ["ALIASES", "KEYS", "TrainSettings", "config_error", "default_of", "load_settings"]
