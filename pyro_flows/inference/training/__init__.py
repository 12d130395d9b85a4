"""One run of a flow on a log density: losses, Adam, recorded steps, and the check of convergence.

A flow, a log density and a budget of steps go in; the trained flow and its losses come out. Read ``loop.py`` first.
"""
