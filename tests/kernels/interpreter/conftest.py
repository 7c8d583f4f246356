"""Every test in this folder runs under Triton's interpreter with its bfloat16 arithmetic put right."""

import interpreter_bf16

interpreter_bf16.install()
