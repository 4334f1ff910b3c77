"""Which Triton this is, asked once."""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels are run by Triton's interpreter, on the CPU; decided when triton is imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# Polling without a read-modify-write came after 3.6. The interpreter has one program at a time, for which nobody waits.
HAS_POLL: bool = hasattr(tl, "atomic_poll") and not INTERPRETED
