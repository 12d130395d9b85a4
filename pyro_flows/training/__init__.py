"""One run of a flow on a log density."""
