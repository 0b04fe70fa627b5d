"""What methods need to have seen of a model: its layers' inputs and gradients while it reads calibration batches."""

from pissa.observe.observations import Observations
from pissa.observe.reading import observe

__all__ = ["Observations", "observe"]
