"""Yesterday's posterior as today's prior."""
