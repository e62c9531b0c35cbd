"""Files in, files out: the original's tensors and companions; our format, its writer and its loader."""
