"""`python -m aphrodite.cli`, for where the script is not on the path."""

from aphrodite.cli.main import main

main()
