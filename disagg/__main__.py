"""`python -m disagg` is the command line."""

from disagg.experiments.cli import main

main()
