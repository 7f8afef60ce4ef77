"""Mechanism, without I/O: the executor's scheduler, the orchestrator, their events and commands, and what a step costs."""
