"""Numbers in, a judgement out: weights, k-hat, and what they say of a fit."""
