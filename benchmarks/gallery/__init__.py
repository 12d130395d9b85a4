"""Pictures of real posteriors and of flows, for the pages of the documentation; and which flow fits them."""
