"""The posterior that a fit hands over: its methods call all other rooms."""
