"""`python -m pissa` is the command line."""

from pissa.cli.main import main

main()
