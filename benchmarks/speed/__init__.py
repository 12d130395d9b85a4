"""Speed, side by side: a worker for each method and case, those that take turns, and the tables."""
