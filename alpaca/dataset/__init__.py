"""Generate, audit and visualize instruction data sets."""
