"""What leaves the package: ArviZ groups, files, and the sentence that says how draws were made.

A posterior goes in; labeled arrays, a folder of files, or text with references come out. Read ``arviz_groups.py``
first.
"""
