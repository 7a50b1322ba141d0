"""`python -m alpaca VERB`."""

from alpaca.cli import main

main()
