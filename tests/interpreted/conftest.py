"""These tests run in a process of their own, where Triton interprets the kernels: test_triton_interpreted.py starts it."""

import os

# Triton decides when it is imported, so a process that did not ask for its interpreter from the start has none of these tests.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
