"""Attention over packed rows: masks, the choice of a kernel, and the kernels.

Callers need `dispatch.packed_attention`, and `dispatch.cached_attention` for decoding; the modules
`blockwise`, `splash`, `triton` and `live` hold one kernel each, and `dispatch` alone imports them.
"""
