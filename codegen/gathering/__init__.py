"""The text of the kernels that gather selected rows, around what a pattern prints into them."""
