"""Modes that a guide lacks: exact moves, paths, tempering, draws that wander."""
