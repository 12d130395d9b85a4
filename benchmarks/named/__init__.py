"""Models that statisticians bring, fitted as they are written, against long runs of NumPyro's NUTS."""
