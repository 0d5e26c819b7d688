"""Memory without a GPU: the real transformers model on the meta device, counted storage by storage.

    from qtool.exact.peak import ExactRequest, exact_peak
    exact_peak(config, ExactRequest(quant="nf4", context=8192)).allocated_peak_bytes

The modules, their shapes and the lifetimes of tensors are transformers' and PEFT's own. Replaced
is what exists only as a GPU kernel: fused attention, dropout, autocast, bitsandbytes' layers.
Not counted: what kernels take inside a call and give back (sorting, cuBLAS' workspace), and what
the caching allocator adds.
"""
