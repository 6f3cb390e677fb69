"""Calibration: which layers of a model bear which pattern. Measures, and writes a config; changes nothing else."""
