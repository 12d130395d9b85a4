"""Seconds from the first import to the verdict, each in a new process."""
