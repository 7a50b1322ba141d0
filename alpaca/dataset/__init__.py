"""Making, auditing and looking at instruction data sets."""
