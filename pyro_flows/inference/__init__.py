"""What a posterior is found with: ``starts``, ``training``, ``modes``, ``chains`` and the ``verdict``.

A log density and a seed go in; Gaussians, trained flows, missed regions, chains and judgements come out, which
``fitting`` puts together. Read ``record.py`` first: it names the fields of each result.
"""
