"""The process that a call runs in: its seeds, threads, time limit, signals, checkpoints, progress line and account.

A public function opens them around its work; what it computes comes out unchanged, is cut at a time limit, or goes on
from a file. Read ``clock.py`` first, then ``journal.py``.
"""
