"""What a fit hands over: draws and verdict, as a value, as ArviZ groups, as files."""
