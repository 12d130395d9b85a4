"""Conditional flows of speech: nats a sample, and reconstruction from mel spectrograms."""
