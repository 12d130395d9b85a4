"""Toy targets whose log normalisers and moments are known, and planar flows on a ring."""
