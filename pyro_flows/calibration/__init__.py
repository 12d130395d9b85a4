"""Many fits of one model, and whether its posteriors are calibrated."""
