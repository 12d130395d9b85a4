"""Numbers that every room needs: shapes of tensors, labeled arrays, a cache, R-hat and effective draws.

Tensors go in, and tensors, arrays or plain numbers come out. Read ``tensors.py`` first.
"""
