"""What is done with judged posteriors: evidence, leave-one-out, comparison, sensitivity."""
