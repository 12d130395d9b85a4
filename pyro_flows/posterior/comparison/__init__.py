"""What is done with judged posteriors: evidence, leave-one-out, comparison, sensitivity, prior predictions.

Posteriors go in; estimates with their Monte Carlo errors come out. Read ``compare.py`` first.
"""
