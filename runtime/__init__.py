"""Real executors: turns the commands of the cores into work of devices and messages of MPI. Decides nothing."""
