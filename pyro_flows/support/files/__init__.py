"""Files that are complete or not there, folders with digests, and checks of files of strangers.

Tensors, plain values and netCDF groups go in, paths come out, and the reverse; ``inputs.py`` reads models and data for
the command line. Read ``files.py`` first.
"""
