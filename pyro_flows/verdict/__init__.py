"""The verdict: weights, k-hat, diagnostics of chains, and all thresholds."""
