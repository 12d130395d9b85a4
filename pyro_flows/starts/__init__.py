"""Where a fit starts: modes, curvature, Gaussians along paths, and the coordinates it works in."""
