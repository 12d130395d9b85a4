"""Simulation-based calibration: are posteriors calibrated, and what do many fits side by side save?"""
