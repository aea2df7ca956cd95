"""Runs model-written Python where it can do no harm: `pool.SandboxPool` fulfils `ports.Sandbox`.

Three kinds of process, each knowing as little as it can:

    pool.py (the caller's process)   never parses program text, input text or a result other than as bounded JSON
      parser   (inside/parser.py)    text -> checked, compiled code and literal arguments; never runs any of it
      zygote   (inside/zygote.py)    warm interpreter; forks, times, kills, reports; never reads an untrusted byte
        child  (inside/program.py)   one fork per program: reads its request, runs it, writes what it claims came out

`inside/` and `algorithm/values.py` are all that the sandboxed processes import. docs/sandbox.md says what this
protects from and what it does not.
"""
