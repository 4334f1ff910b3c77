"""torch's private names, all that the package reads while it runs: what a new version of torch moves is mended here.

They have the names that this package uses. Dynamo knows the functions by what they are, not by where they are found.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad as forward_ad

# What a call is inside of.
dispatch_modes = torch._C._len_torch_dispatch_stack
jit_tracing = torch._C._is_tracing
any_autocast = torch._C._is_any_autocast_enabled
dynamo_compiling = torch.compiler.is_dynamo_compiling
plain_dispatch = torch.Tensor.__torch_dispatch__
backward_run = torch._C._current_graph_task_id
no_torch_function = torch._C._disabled_torch_function_impl
TracerWarning = torch.jit._trace.TracerWarning

# The transforms of torch.func, and the tensors that they wrap.
transforms_active = torch._C._are_functorch_transforms_active
interpreter_stack = torch._C._functorch.get_interpreter_stack
Transform = torch._C._functorch.TransformType
WithoutTransforms = torch._C._DisableFuncTorch
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_mapped = torch._C._functorch.is_batchedtensor
inner = torch._C._functorch.get_unwrapped
inner_if_dead = torch._C._functorch.unwrap_if_dead

# The older vmap, by which torch.autograd.grad(is_grads_batched=True) maps a backward.
is_mapped_by_autograd = torch._C._functorch.is_legacy_batchedtensor
enter_map = torch._C._vmapmode_increment_nesting
leave_map = torch._C._vmapmode_decrement_nesting
add_map = torch._add_batch_dim
remove_map = torch._remove_batch_dim

# Kernels of operators.
BelowAutograd = torch._C._AutoDispatchBelowAutograd
keys_after_autograd = torch._C._after_autograd_keyset


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is entered."""
    return forward_ad._current_level >= 0
