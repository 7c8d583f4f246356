"""`python -m moesparse` is the command line."""

from moesparse.cli import main

main()
