"""A page to send: verdict, table, figures, checks, settings and how to reproduce, in one HTML file.

A posterior goes in, and one file without links to other files comes out. Read ``page.py`` first.
"""
