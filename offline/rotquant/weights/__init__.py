"""Weight quantizers: float weights in, integer codes and scales out."""
