"""Toy targets whose log normalizers and moments are known, and planar flows on a ring."""
