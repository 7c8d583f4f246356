"""Kernel tests run in three processes: plain, under Triton's interpreter, and compiling ahead of time.

Triton reads TRITON_INTERPRET once, at import, so one process cannot both interpret and compile. The outer run does not
collect the two inner folders; test_interpreter.py and test_aot.py start them (see _subrun.py).
"""

import os

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreter")
if os.environ.get("MOESPARSE_AOT") != "1":
    collect_ignore.append("aot")
