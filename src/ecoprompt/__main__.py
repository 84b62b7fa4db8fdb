"""`python -m ecoprompt`."""

from ecoprompt.cli import main

main()
