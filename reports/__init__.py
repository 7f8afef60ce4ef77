"""Reads run directories and compares them: policies with policies, simulation with hardware."""
