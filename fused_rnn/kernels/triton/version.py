"""Which Triton this is, asked once."""

from __future__ import annotations

import triton

# Whether kernels are run by Triton's interpreter, on the CPU; decided when triton is imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
