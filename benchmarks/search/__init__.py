"""How many planted modes the search for missed modes finds."""
