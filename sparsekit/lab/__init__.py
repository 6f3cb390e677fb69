"""The laboratory: tasks, evaluation, calibration, benches, sweeps and what shows their results."""
