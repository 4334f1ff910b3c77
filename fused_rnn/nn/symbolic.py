"""torch.fx.symbolic_trace: a call of a module is one node, as those of torch.nn's modules are.

A Tracer asks for the name of a class to tell whether its forward is to be traced, and knows torch.nn's alone. So the forward of
these modules runs with stand-ins for tensors, and puts the node into the graph itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy, _symbolic_trace
from torch.utils._pytree import tree_leaves


def traced() -> bool:
    """Whether a trace of torch.fx runs, of this kind or of make_fx, which traces tensors."""
    return _symbolic_trace._is_fx_tracing_flag


def recorded(module: nn.Module, input: Any, hx: Any, **keywords: Any) -> Any:
    """Record a call of ``module``.

    Args:
        input, hx, keywords: of its forward; None and False are defaults.

    Returns:
        what stands for the result, or None where no argument stands for a tensor, or ``module`` is what is traced: then its
        forward is to run.

    Raises:
        NameError: if the module is not part of what is traced.
    """
    arguments = (input,) if hx is None else (input, hx)
    keywords = {name: value for name, value in keywords.items() if value is not None and value is not False}
    proxies = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Proxy)]
    if not proxies or getattr(proxies[0].tracer, "root", None) is module:
        return None
    tracer: Any = proxies[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, keywords)
