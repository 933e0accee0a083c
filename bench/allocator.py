"""Memory of the timing process on a CPU, so that where a block lies does not show in its times."""

import ctypes
from pathlib import Path

# glibc's mallopt: how many blocks may be mapped apart, and from how many free bytes at its end a heap is cut.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
# Linux: madvise's number for huge pages, their usual size, and how much of the heap gets them. Less than the largest
# trim threshold, above which glibc would give it back.
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2**21
HUGE_HEAP_BYTES = 2**30
HUGE_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_freed_memory() -> bool:
    """Has glibc reuse freed blocks in this process instead of giving them back to the system; whether it does now.

    Else every large temporary is paged in anew in each pass: up to a third of the time, and another part in every run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    return mallopt is not None and all(mallopt(*o) == 1 for o in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))


def use_huge_pages() -> bool:
    """Has Linux back the heap of this process with huge pages from here on; whether it does. Call it first thing.

    Where small pages lie moved ratios by 8 %. It takes and frees a block of the heap: :func:`keep_freed_memory` first.
    """
    if not HUGE_PAGES_SETTING.exists() or "[never]" in HUGE_PAGES_SETTING.read_text():
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HUGE_HEAP_BYTES)
    if block is None:
        return False
    first = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    advised = libc.madvise(first, HUGE_HEAP_BYTES - HUGE_PAGE_BYTES, MADV_HUGEPAGE)
    libc.free(block)
    return advised == 0
