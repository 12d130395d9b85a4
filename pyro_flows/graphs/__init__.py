"""Functions of tensors as flat graphs: recorded once, rewritten, put together, and run by an interpreter in C.

Other rooms import these names, and nothing else of this room:

* :func:`record` runs a function and returns its tensor operations as a graph.
* :class:`Runner` runs a graph: block by block by the interpreter in C, or by torch.
* :class:`Recorder` does both for a function of a batch of points: it keeps graphs for few batch sizes, compares each
  with the function, and calls the function itself where there is no graph; a :class:`RecorderState` is for checkpoints.
* :func:`refuse_recording` lets code say, while it is recorded, that it is not worth a graph.
* :func:`agree` compares results but for rounding: check a graph at points where it was not recorded.
* :class:`Stitcher` joins graphs into one.
* :func:`partition` splits a joint graph of two passes into forward and backward.
* :func:`stacked` batches a graph over a new first axis, for many sets of inputs.
* :func:`interpreter_is_built` says whether the extension in C is there.

The page "The room graphs" of the documentation says how they work together.

>>> import torch
>>> def log_density(z):
...     return (-0.5 * z.square().sum(-1),)
>>> run = Runner(record(log_density, torch.zeros(3, 2)))
>>> z = torch.ones(3, 2)
>>> agree(run(z), log_density(z))
True
"""

from pyro_flows.graphs.graph import Stitcher
from pyro_flows.graphs.native import interpreter_is_built
from pyro_flows.graphs.partitioning import partition
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
