"""One file per verb of the command line; they print and decide nothing."""
