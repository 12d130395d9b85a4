"""Densities of data: fits, other libraries, the time of one step, tables and pictures."""
