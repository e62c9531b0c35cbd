"""CUDA kernels. Each module maps op names to functions in `IMPLEMENTATIONS`."""
