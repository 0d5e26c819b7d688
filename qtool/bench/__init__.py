"""How fast the kernels and the whole quantize command are, beside what the machine can do.

Every figure is a median of samples that were taken in turns with those of the limit (a copy of the
same bytes on the same device, a raw read and write of the same files) and of other libraries, so
that whatever disturbs the machine disturbs all of them. Sizes are bytes, times are seconds.
"""
