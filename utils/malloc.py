"""Training on a CPU with glibc: keep the memory that a step frees for the next one."""

import ctypes


def keep_freed_memory():
    """Tell glibc's malloc not to hand large freed blocks back to the kernel, which it does by default.

    Every step allocates the same activations anew, and getting the pages back one fault at a time took a third of a DPK
    step here. The same as MALLOC_MMAP_MAX_=0 and the like in the environment. Nothing happens where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in (-4, 0), (-1, 2**31 - 1), (-2, 2**30):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(parameter, value)
