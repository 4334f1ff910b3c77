"""Loops over single steps: the gradients of the weights are summed over all steps of a loop by one product.

A step alone would make gradients as large as the weights out of a few rows, and autograd would add them to those of the other
steps: of a loop's backward that is most of the time. So the steps of a loop have one node of the graph in common, ``_Sum``,
which stands between them and the weights. In the backward, a step leaves there the gradients of its gates and what the weights
multiplied. The node runs after the last of them, as autograd orders it, and forms the gradients of the weights.

A step belongs to a loop if its h has a graph: the first step of a loop, and one that stands alone, have their gradients formed
at once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn.data import torch_private
from fused_rnn.data.cell import Cell, Weights
from fused_rnn.kernels.protocol import GateBackend, LayerCall, StepOperands

# What is left at a node is summed up whenever it has so many rows.
_MOST_ROWS = 4096


class _Sums:
    """The gradients of one recurrence's weights in one run of the backward."""

    def __init__(self, cell: Cell, wanted: Sequence[bool], backend: GateBackend) -> None:
        self.cell, self.wanted, self.backend = cell, wanted, backend
        self.steps: list[StepOperands] = []
        self.rows = 0
        self.total: Sequence[Tensor | None] = ()

    def add_step(self, step: StepOperands, rows: int) -> None:
        """Add one step's, later."""
        self.steps.append(step)
        self.rows += rows
        if self.rows > _MOST_ROWS:
            self._sum_up()

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add gradients of the weights, which may have a graph."""
        if not self.total:
            self.total = grads
            return
        self.total = [
            each if before is None else before if each is None else before + each
            for before, each in zip(self.total, grads, strict=True)
        ]

    def _sum_up(self) -> None:
        steps, self.steps, self.rows = self.steps, [], 0
        self.add(self.backend.loop_gradients(self.cell, steps, self.wanted))

    def result(self) -> Sequence[Tensor | None]:
        """The sums of all steps, in the places of ``Weights``."""
        if self.steps:
            self._sum_up()
        return self.total


class _Node(torch.autograd.Function):
    """Stands for the weights where steps join the graph."""

    @staticmethod
    def forward(ctx: Any, left: Left, *weights: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.left = left
        return left.weights.hh.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        sums = ctx.left.take()
        if sums is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[1:]
        return (None, *[grad if asked else None for grad, asked in zip(sums.result(), wanted, strict=True)])


def versions_of(weights: Weights) -> tuple[int, int, int | None, int | None]:
    """How often each of the weights was changed in place; there is no projection."""
    ih, hh, bias_ih, bias_hh, _ = weights
    # In line: this is done at every step.
    return (
        ih._version,
        hh._version,
        None if bias_ih is None else bias_ih._version,
        None if bias_hh is None else bias_hh._version,
    )


def wanted_of(weights: Weights) -> tuple[bool, bool, bool, bool, bool]:
    """Whether the gradient of each of the weights is wanted."""
    ih, hh, bias_ih, bias_hh, _ = weights
    return (
        ih.requires_grad,
        hh.requires_grad,
        bias_ih is not None and bias_ih.requires_grad,
        bias_hh is not None and bias_hh.requires_grad,
        False,
    )


class Left:
    """What steps have left at a node, by the run of the backward that they did it in.

    Several may run at once, in threads or one inside another. What is left of one that an error ended goes with the graph.
    """

    def __init__(self, cell: Cell, weights: Weights, backend: GateBackend) -> None:
        self.cell, self.weights, self.backend = cell, weights, backend
        self.versions = versions_of(weights)
        self.wanted = wanted_of(weights)
        # As a first gradient reads them.
        self.without_biases = (Weights(weights.ih, weights.hh),)
        self.by_run: dict[int, _Sums] = {}

    def unchanged_weights(self) -> Weights:
        """The weights as every step of the loop saw them.

        Raises:
            RuntimeError: as torch does for a saved tensor, if one that a first gradient reads was changed in place since.
        """
        weights, versions = self.weights, self.versions
        if weights.ih._version != versions[0] or weights.hh._version != versions[1]:
            self._refuse_changed()
        return weights

    def check_biases(self) -> None:
        """Raise RuntimeError if a bias was changed, which a second gradient reads, and one of a changed output."""
        if versions_of(self.weights) != self.versions:
            self._refuse_changed()

    def _refuse_changed(self) -> None:
        for weight, now, then in zip(self.weights, versions_of(self.weights), self.versions, strict=False):
            if now != then:
                assert weight is not None
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a weight "
                    f"of shape {tuple(weight.shape)} is at version {now}; expected version {then} instead"
                )

    def of_this_run(self) -> _Sums:
        """The sums of the run of the backward that calls."""
        run = torch_private.backward_run()
        sums = self.by_run.get(run)
        if sums is None:
            sums = self.by_run[run] = _Sums(self.cell, self.wanted, self.backend)
        return sums

    def take(self) -> _Sums | None:
        """The same, at its end; None if no step left anything."""
        return self.by_run.pop(torch_private.backward_run(), None)


class Loop:
    """The node that the steps of a loop have in common.

    Attributes:
        token: its result, without elements. A step that is a function of it leads to the node.
        left: what the steps leave there.
    """

    __slots__ = ("__weakref__", "left", "token")

    def __init__(self, cell: Cell, weights: Weights, backend: GateBackend) -> None:
        self.left = Left(cell, weights, backend)
        self.token: Tensor = _Node.apply(self.left, *weights)  # type: ignore[no-untyped-call]


# By the id of weight_hh, which lives as long as the loop. The graphs of its steps keep a loop alive, and nothing else does.
_loops: dict[int, weakref.ref[Loop]] = {}


def loop_of(call: LayerCall) -> Loop | None:
    """The loop that a call is a step of, or None where it is none. For calls that are recorded."""
    layer, _, states, weights, reset = call
    if states is None or layer.steps.length != 1 or not states[0].requires_grad or not layer.backend.gives_gates:
        return None
    if _shards_by_module():
        return None
    of = weights[0]
    if of.hr is not None or len(weights) > 1 or reset is not None or layer.cell_states or layer.steps.batch_sizes is not None:
        return None
    key = id(of.hh)
    known = _loops.get(key)
    loop = None if known is None else known()
    wanted = wanted_of(of)
    if loop is not None:
        left = loop.left
        same = left.cell is layer.cell and left.backend is layer.backend
        for one, other in zip(left.weights, of, strict=True):
            same = same and one is other
        if same and left.wanted == wanted and left.versions == versions_of(of):
            return loop
    if not any(wanted) or any(each is not None and each.is_inference() for each in of):
        return None
    loop = Loop(layer.cell, of, layer.backend)  # type: ignore[arg-type]
    _loops[key] = weakref.ref(loop, lambda ended: _forget(key, ended))
    return loop


def _forget(key: int, ended: weakref.ref[Loop]) -> None:
    """Drop a loop, unless another has taken its place."""
    if _loops.get(key) is ended:
        del _loops[key]


def _shards_by_module() -> bool:
    """Whether torch.distributed's fully_shard is in use: it takes the gradients of weights when a module's backward ends.

    That is before the end of a loop, if the module is one step of it. A tensor does not tell whether such a module owns it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(fsdp, "FSDPModule", None)
    return sharded is not None and bool(sharded.__subclasses__())
