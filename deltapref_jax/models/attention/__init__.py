"""Attention over packed rows: masks, the choice of a kernel, and the kernels.

Callers need `dispatch.packed_attention` (and `dense.cached_attention` for decoding); the modules
`blockwise`, `splash` and `triton` hold one kernel each and are imported by `dispatch` alone.
"""
