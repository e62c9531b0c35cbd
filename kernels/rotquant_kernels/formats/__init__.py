"""Number formats: what a row of activations, a weight matrix and the KV cache are rounded to.

A format is one object that travels from a recipe or a checkpoint to the op, in the place of its numbers. Who rounds,
learns, packs, measures or reports asks it; plain numbers are only what torch's ops take, and `calls` is where a format
becomes them. A family is a file here:

    integers    codes of b bits: `RowFormat` for activations, `WeightFormat` for weights
    kv          `KVFormat`, the 4-bit cache: two row formats and a layout
    feedback    how keys are rounded where one channel's error is made good by the others

Pure torch: importing this loads no kernel.
"""

from rotquant_kernels.formats.integers import RowFormat, WeightFormat
from rotquant_kernels.formats.kv import KVFormat

__all__ = ["KVFormat", "RowFormat", "WeightFormat"]
