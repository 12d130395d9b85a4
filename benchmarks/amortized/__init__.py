"""Amortized posteriors: are answers to new data sets usable and right, how fast are they, and which data are named?"""
