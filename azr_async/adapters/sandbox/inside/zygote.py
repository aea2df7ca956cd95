"""The zygote: a warm interpreter that forks one child for each program. It never reads a byte that is not the pool's.

The zygote forks ahead: a child behind all walls waits at the request pipe. The pool writes a request there and an order
into the control pipe; the child reads the request, runs it and writes its claims into the result pipe, one frame for
each input. The zygote waits, kills at the deadline, reports, and forks the next child.
"""

import builtins
import gc
import marshal
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from azr_async.adapters.sandbox.inside import layers
from azr_async.adapters.sandbox.inside.canaries import CANARY, attempts
from azr_async.adapters.sandbox.inside.clock import shift_clock
from azr_async.adapters.sandbox.inside.library import builtin_names, guard_library
from azr_async.adapters.sandbox.inside.program import Namespace, Stage
from azr_async.adapters.sandbox.inside.starters import note_starters
from azr_async.adapters.sandbox.inside.wire import NO_FORK, ORDER, REPORT, SURE, read_frame, split_parts, write_frame

STRAGGLER_SECONDS: Final = 0.2
STRAGGLER_NICENESS: Final = 5
"""Programs that take long give way to those that do not."""

_CODECS: Final = """
    ascii charmap latin_1 utf_7 utf_8 utf_8_sig utf_16 utf_16_be utf_16_le utf_32 utf_32_be utf_32_le unicode_escape
    raw_unicode_escape hex_codec base64_codec rot_13 koi8_r koi8_u mac_roman mac_cyrillic
    cp437 cp850 cp866 cp1250 cp1251 cp1252 cp1253 cp1254 iso8859_1 iso8859_2 iso8859_5 iso8859_7 iso8859_9 iso8859_15
"""
_LARGE_CODECS: Final = "idna punycode shift_jis gbk big5 euc_jp euc_kr"
"""With libraries of their own. Every mapping makes each fork dearer, so they come only with the module `codecs`."""
_IMPORTED_LATE: Final = ("collections.abc", "copyreg", "heapq", "inspect", "math", "typing", "unicodedata", "weakref")
"""Modules that the standard library imports only when some function is called; a child could not open them."""

_WARM_UP: Final = """
import math
from collections import Counter
def f(x, y=None):
    'doc'
    r = []
    for i, c in enumerate(sorted(x)):
        if c > 1 and i % 2 == 0: r.append(c * 2)
        else: r.append((c, str(i)))
    d = {k: v for k, v in zip('abc', r)}
    t = f'{len(r)}:{sum(q for q in x)}'
    try: z = 1 / len(r)
    except ZeroDivisionError: z = 0
    class A:
        def __init__(self): self.x = 1
    A().x; Counter('abc').most_common(1)
    return {'a': [1, 2.5, (1, 2)], 'b': t, 'c': {1, 2}, 'd': t.upper().split(), 'e': None}
"""


def prepare(options: layers.Options) -> tuple[layers.Report, Callable[[], None]]:
    """Confine this process; the layers that hold it, and the function that serves until the pool closes its end."""
    if options["flavour"] > 0:
        shift_clock(options["flavour"])
    _import_what_programs_may_use(options["allowed_imports"])
    note_starters()  # before programs get facades of these modules
    guarded_names = builtin_names(frozenset(options["allowed_imports"]))
    if options["is_gated"]:
        guard_library(guarded_names)
    own_kib = layers.address_space_and_resident_bytes()[1] >> 10  # later the walls forbid to ask
    report = layers.confine(options, filter_name="ZYGOTE")
    put_wall_on = layers.child_wall(report, options["cpu_seconds"])
    sys.stdin = None
    sys.stdout = sys.stderr = _Nowhere()
    sys.setrecursionlimit(1000)
    _warm_up(guarded_names, options["result_bytes"])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    stage = Stage(guarded_names if options["is_gated"] else dict(vars(builtins)), options["result_bytes"])
    return report, partial(_serve, put_wall_on, stage, own_kib)


def _serve(put_wall_on: Callable[[], None], stage: Stage, own_kib: int) -> None:
    gc.collect()
    gc.freeze()
    child = _fork_ahead(put_wall_on, stage)
    while len(order := os.read(layers.CONTROL_FD, ORDER.size)) == ORDER.size:
        try:
            child = child or _fork(put_wall_on, stage)
        except OSError as error:
            os.write(layers.REPORT_FD, REPORT.pack(NO_FORK, error.errno or 0, 0, 0, 0))
            return
        report, ended_well = _wait(child, ORDER.unpack(order)[0] / 1000, own_kib)
        os.write(layers.REPORT_FD, report)
        # What another one has left of its request is for the pool to clear away, before anybody reads on.
        child = _fork_ahead(put_wall_on, stage) if ended_well else None


def _fork_ahead(put_wall_on: Callable[[], None], stage: Stage) -> int | None:
    """A child that waits for its request; None while there is no memory for one, since nobody has asked for it yet."""
    try:
        return _fork(put_wall_on, stage)
    except OSError:
        return None


def _fork(put_wall_on: Callable[[], None], stage: Stage) -> int:
    child = layers.real_fork()
    if child == 0:
        _be_the_child(put_wall_on, stage)
    return child


def _be_the_child(put_wall_on: Callable[[], None], stage: Stage) -> None:
    """Put the walls on, wait for the request, answer it, end."""
    status = 1
    try:
        put_wall_on()
        code, *inputs = split_parts(read_frame(layers.REQUEST_FD) or b"")
        answers = attempts(code) if code[:1] == CANARY else stage.claims(code, inputs)
        for answer in answers:
            write_frame(layers.RESULT_FD, answer)
        status = 0
    finally:
        os._exit(status)


def _wait(child: int, wall_seconds: float, own_kib: int) -> tuple[bytes, bool]:
    """Wait for the child's end, bring it about at the deadline; the report, and whether it ended by itself and well."""
    started = time.monotonic()
    was_killed = False
    limits = [STRAGGLER_SECONDS, wall_seconds] if wall_seconds > STRAGGLER_SECONDS else [wall_seconds]
    for limit in limits:
        ended = _ended(child, started + limit)
        if ended is not None:
            break
        if limit != wall_seconds:
            os.setpriority(os.PRIO_PROCESS, child, STRAGGLER_NICENESS)
    else:
        was_killed = True
        os.kill(child, signal.SIGKILL)
        ended = os.wait4(child, 0)
        signal.sigtimedwait([signal.SIGCHLD], 0)
    _, status, usage = ended
    peak_kib = min(max(0, usage.ru_maxrss - own_kib), 2**32 - 1)
    report = REPORT.pack(was_killed, status, int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6), peak_kib)
    return report, status == 0


def _ended(child: int, deadline: float) -> tuple[int, int, resource.struct_rusage] | None:
    while signal.sigtimedwait([signal.SIGCHLD], max(0.0, deadline - time.monotonic())) is not None:
        ended = os.wait4(child, os.WNOHANG)
        if ended[0] == child:
            return ended
    return None


def _import_what_programs_may_use(allowed_imports: list[str]) -> None:
    # threading, random and logging ask to be run at every fork: half a millisecond that nobody here needs.
    os.register_at_fork = lambda **hooks: None
    codecs = f"{_CODECS} {_LARGE_CODECS}" if "codecs" in allowed_imports else _CODECS
    names = [f"encodings.{codec}" for codec in codecs.split()]
    names += ["_strptime"] if {"time", "datetime"} & set(allowed_imports) else []
    names += ["stringprep"] if "codecs" in allowed_imports else []
    for name in [*allowed_imports, *_IMPORTED_LATE, *names]:
        __import__(name)
    for name in {"settrace", "setprofile", "_current_frames", "monitoring"} & set(vars(sys)):
        delattr(sys, name)  # with these a program could follow the code that writes its result


def _warm_up(names: Namespace, result_bytes: int) -> None:
    """Run a program through the path of every later one, so that children find their memory already touched."""
    code = SURE + marshal.dumps(compile(_WARM_UP, "<program>", "exec"))
    argument = b"A" + SURE + marshal.dumps((([3, 1, 2],), {}))
    stage = Stage(names | {"__import__": builtins.__import__}, result_bytes)
    for claim in (claim for _ in range(20) for claim in stage.claims(code, [argument])):
        if claim[:1] != b"V":
            raise RuntimeError(f"the warm-up program failed: {claim!r}")


class _Nowhere:
    """Standard output of a program: accepts everything, keeps nothing."""

    encoding = "utf-8"
    errors = "replace"
    closed = False

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False
