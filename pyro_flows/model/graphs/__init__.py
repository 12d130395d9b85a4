"""Functions of tensors as flat graphs: recorded once, rewritten, put together, and run by an interpreter in C.

Other rooms import these names, and nothing else of this room. A function and an example of its tensors go in; a graph,
and a `Runner` that evaluates it on batches, come out. The page "The room graphs" of the documentation says what each
name does, who uses it, and how they work together. Read ``recording.py`` first, then ``runner.py``.

>>> import torch
>>> def log_density(z):
...     return (-0.5 * z.square().sum(-1),)
>>> run = Runner(record(log_density, torch.zeros(3, 2)))
>>> z = torch.ones(3, 2)
>>> agree(run(z), log_density(z))
True
"""

from pyro_flows.model.graphs.graph import Stitcher
from pyro_flows.model.graphs.partitioning import partition
from pyro_flows.model.graphs.programs import interpreter_is_built
from pyro_flows.model.graphs.recorder import Recorder, RecorderState
from pyro_flows.model.graphs.recording import record, refuse_recording
from pyro_flows.model.graphs.rounding import agree
from pyro_flows.model.graphs.runner import Runner
from pyro_flows.model.graphs.stacking import stacked

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
