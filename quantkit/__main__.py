"""`python -m quantkit`: the command line, for where the installed script is not on the path."""

from quantkit.cli import run

run()
