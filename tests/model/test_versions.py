"""The versions that a report of a bug names."""

from __future__ import annotations

import os
import shutil

import torch

import pyro_flows as pf
from pyro_flows.model.graphs import interpreter_is_built


def test_the_versions_are_shown(capsys):
    pf.show_versions()
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["pyro-flows"] == pf.__version__
    assert shown["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert shown["interpreter"] == ("built" if interpreter_is_built() else "not built, so graphs run by torch alone")


def test_the_interpreter_is_built_where_there_is_a_compiler():
    assert interpreter_is_built() or shutil.which(os.environ.get("CC", "cc")) is None
