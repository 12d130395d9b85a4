"""Where a fit starts: modes, curvature, Gaussians along paths, and the coordinates that it works in.

A log density goes in; Gaussians with their ELBO, best first, come out. Read ``portfolio.py`` first.
"""
