"""Experiment files, workloads and traces, run directories, and the command line."""
