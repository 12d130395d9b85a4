"""Functions of tensors as flat graphs: recorded once, rewritten, put together, and run by an interpreter in C.

Other rooms import these names, and nothing else of this room. The page "The room graphs" of the documentation says what
each does, who uses it, and how they work together.

>>> import torch
>>> def log_density(z):
...     return (-0.5 * z.square().sum(-1),)
>>> run = Runner(record(log_density, torch.zeros(3, 2)))
>>> z = torch.ones(3, 2)
>>> agree(run(z), log_density(z))
True
"""

from pyro_flows.graphs.graph import Stitcher
from pyro_flows.graphs.partitioning import partition
from pyro_flows.graphs.programs import interpreter_is_built
from pyro_flows.graphs.recorder import Recorder, RecorderState
from pyro_flows.graphs.recording import record, refuse_recording
from pyro_flows.graphs.rounding import agree
from pyro_flows.graphs.runner import Runner
from pyro_flows.graphs.stacking import stacked

__all__ = [
    "Recorder",
    "RecorderState",
    "Runner",
    "Stitcher",
    "agree",
    "interpreter_is_built",
    "partition",
    "record",
    "refuse_recording",
    "stacked",
]
