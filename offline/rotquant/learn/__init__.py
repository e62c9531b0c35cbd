"""Learning rotations, scales and clip ratios: quantizers with gradients, objectives and optimisers. Pure torch."""
