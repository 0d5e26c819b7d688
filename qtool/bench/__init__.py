"""How fast kernels, the whole quantize command and models are, beside what the machine can do.

The limit (a copy of bytes on the same device, a raw read and write of the same files) is measured
in the same run, and other libraries take turns with qtool, so that whatever disturbs the machine
disturbs all of them. Kernels and commands have medians of their samples, models means of their
tokens per second. Sizes are bytes, times are seconds.
"""
