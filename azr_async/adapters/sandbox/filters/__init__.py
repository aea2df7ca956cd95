"""Makes the seccomp filters. Nothing here runs in a sandboxed process: `python -m azr_async.adapters.sandbox.filters`
writes the finished bytes into `inside/filters.py`, for both architectures, and a test checks that they are up to date.

    rules.py      which system call may do what, in names
    numbers.py    what the names are on x86_64 and aarch64
    assembler.py  rules -> the kernel's filter instructions
"""
