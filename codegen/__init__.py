"""Plan to programs: FlexAttention functions and block masks, kernels of our own, and the capture of generated code."""
