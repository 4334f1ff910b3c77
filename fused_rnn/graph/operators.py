"""The layer as operators of torch's dispatcher: what torch.compile, torch.export and the like see in place of the kernels.

Two operators take and give plain tensors: ``fused_rnn::layer_forward`` and ``fused_rnn::layer_backward``, which is the gradient
of the first. The others look at values that a trace does not have: ``fused_rnn::check_batch_sizes``, ``fused_rnn::ragged`` at
lengths, and ``fused_rnn::one_step_earlier``. Plain eager calls do not come here: ``fused_rnn.graph.autograd`` calls the kernels
itself, which costs less per call.

The backend is chosen when an operator runs, by ``fused_rnn.kernels.dispatch``, so one compiled program obeys every
``fused_rnn.backend`` and ``FUSED_RNN_BACKEND`` that it is called under. Legend as in ``fused_rnn.kernels.protocol``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.cells import named
from fused_rnn.data import sequences, torch_private
from fused_rnn.data.cell import Cell, Weights, initial_states
from fused_rnn.data.sequences import Ragged
from fused_rnn.data.steps import Steps
from fused_rnn.graph import autocast, onnx_export
from fused_rnn.graph.tracing import exporting, quietly, refuse_traced_tangents
from fused_rnn.kernels import dispatch
from fused_rnn.kernels.protocol import Backend, Layer, LayerCall, OutputGradients, States

# No list holds an absent tensor, because torch drops or refuses such lists in places. What is there is said by 0 and 1 instead
# (torch.jit.trace has no lists of bool): `present` in the places of the D `Weights`, `given` in those of the forward's results.
library: Any = torch.library.Library("fused_rnn", "DEF")  # type: ignore[no-untyped-call]
library.define(
    "layer_forward(str cell, Tensor input, Tensor[] states, Tensor[] weights, int[] present, Tensor? batch_sizes, "
    "Tensor? reset, int[] reverse, bool keep, bool cell_states) -> Tensor[]"
)
library.define(
    "layer_backward(str cell, Tensor input, Tensor[] states, Tensor[] weights, int[] present, Tensor? batch_sizes, "
    "Tensor? reset, int[] reverse, Tensor out, Tensor tape, Tensor[] d_outputs, int[] given, int[] wanted) -> Tensor[]"
)
# The tensors that the sizes are those of: torch.jit.trace would keep a number as it was in the trace.
library.define("check_batch_sizes(Tensor batch_sizes, Tensor data, Tensor? order, Tensor? state) -> Tensor")
library.define("packed_reset(Tensor reset, Tensor sizes, Tensor? order, Tensor input_sizes, Tensor? input_order) -> Tensor")
library.define("ragged(Tensor lengths, Tensor padded, bool batch_first) -> (Tensor, Tensor, Tensor, Tensor)")
library.define("one_step_earlier(Tensor reset, Tensor batch_sizes) -> Tensor")

_T = TypeVar("_T")


def traced(input: Tensor, weight: Tensor) -> bool:
    """Whether a call must be an operator, because something other than the kernels is to see it.

    That is so under torch.compile, torch.export and torch.jit.trace, under any TorchDispatchMode (make_fx, fake tensors, a
    count of operations, selective checkpoints), and for tensors that have no memory of their own (fake tensors, DTensor).
    """
    return (
        # What traces without Dynamo does it by a mode.
        torch_private.dynamo_compiling()
        or torch_private.dispatch_modes() > 0
        or type(input).__torch_dispatch__ is not torch_private.plain_dispatch
        or type(weight).__torch_dispatch__ is not torch_private.plain_dispatch
        or torch_private.jit_tracing()
    )


@quietly
def layer(
    cell: Cell,
    input: Tensor,
    steps: Steps,
    states: States | None,
    weights: Sequence[Weights],
    reverse: Sequence[int],
    reset: Tensor | None = None,
    cell_states: bool = False,
    step: bool = False,
) -> tuple[Tensor, States, Tensor | None]:
    """As ``graph.autograd.layer``, by way of the operators; of ``steps``, only ``batch_sizes`` and the batch are read."""
    flat = [tensor for weight in weights for tensor in weight]
    tensors = [tensor for tensor in flat if tensor is not None]
    leading = input.shape[:-1]
    rows = input.reshape(-1, input.shape[-1]) if len(leading) > 1 else input
    if states is None:
        states = initial_states(cell, input, len(weights), steps.batch, weights[0])
    elif step:
        states = tuple([state.unsqueeze(0) for state in states])
    if onnx_export.wanted():
        dense = input.unsqueeze(0) if step else input
        out, *ends_there = onnx_export.layer(cell, dense, steps, states, weights, reverse, reset, cell_states)
        if step:
            out, ends_there = out.squeeze(0), [end.squeeze(0) for end in ends_there[1:]]
        return out, tuple(ends_there), None
    # What leaves Python is as a rule run without gradients, and should not compute a tape each time. It can be trained all the
    # same: see `_backward`.
    leaving = exporting() or torch.jit._trace.is_tracing()  # type: ignore[no-untyped-call]
    keep = not leaving and torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *states, *tensors))
    outputs = torch.ops.fused_rnn.layer_forward(
        cell.name,
        rows,
        list(states),
        tensors,
        [int(tensor is not None) for tensor in flat],
        steps.batch_sizes,
        reset,
        [int(backwards) for backwards in reverse],
        keep,
        cell_states,
    )
    return shaped(outputs, len(cell.states), leading, cell_states, step)


def shaped(
    outputs: Sequence[Tensor], count: int, leading: Sequence[int], cell_states: bool, step: bool
) -> tuple[Tensor, States, Tensor | None]:
    """A layer's results from those of its operator: rows as the input has them, ``leading``, and of a step the other states."""
    out, ends, cells = outputs[0], tuple(outputs[1 : 1 + count]), outputs[1 + count] if cell_states else None
    if step:
        ends = tuple([end.squeeze(0) for end in ends[1:]])
    if len(leading) > 1:
        out = out.view(*leading, out.shape[1])
        cells = None if cells is None else cells.view(*leading, cells.shape[1])
    return out, ends, cells


@quietly
def packed_steps(batch_sizes: Tensor, data: Tensor, states: States | None, sorted_indices: Tensor | None) -> Steps:
    """The steps of a PackedSequence whose values a trace does not have: they are checked when the program runs.

    Args:
        batch_sizes: (T,) int64 on the CPU.
        data: (R, I).
        states: the initial states, (·, N, ·), or None.
        sorted_indices: (N,), or None.

    Raises:
        RuntimeError: as ``fused_rnn.data.sequences.check_batch_sizes``; of what only the values tell, when the program runs.
        NotImplementedError: under torch.func.linearize.
    """
    refuse_traced_tangents()
    sequences.check_batch_sizes_shape(batch_sizes)
    if sorted_indices is not None:
        batch = sorted_indices.shape[0]
    elif states is not None:
        batch = states[0].shape[1]
    else:
        batch = _first(batch_sizes)
    if onnx_export.wanted():
        return Steps(batch_sizes.shape[0], batch, batch_sizes)
    state = None if states is None else states[0].detach()
    checked = torch.ops.fused_rnn.check_batch_sizes(batch_sizes, data.detach(), sorted_indices, state)
    return Steps(checked.shape[0], batch, checked)


def _first(batch_sizes: Tensor) -> int:
    """N, which stands in no shape here but in the first value alone."""
    batch: Any
    if torch.jit._trace.is_tracing():  # type: ignore[no-untyped-call]
        # As torch.nn: a tensor, which torch takes for a size and records.
        return batch_sizes[0]  # type: ignore[return-value]
    if hasattr(torch._dynamo, "patch_dynamo_config"):
        with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
            batch = batch_sizes[0].item()
    else:
        # torch 2.6 takes such a value into the graph where its own torch._dynamo.config.capture_scalar_outputs says so.
        batch = batch_sizes[0].item()
    torch._check(batch >= 0)  # type: ignore[no-untyped-call]
    # Not int(), which would ask for the value that a trace does not have.
    return batch  # type: ignore[no-any-return]


@quietly
def ragged(lengths: Tensor, padded: Tensor, batch_first: bool) -> Ragged:
    """As ``Ragged.of``, of lengths that are checked when the program runs; how many rows and steps they have is known then.

    All T steps of every sequence are a ragged batch too: a trace cannot tell.

    Args:
        lengths: (N,), of any integers and on any device.
        padded: the padded batch, of which T and the device are read: torch.jit.trace would keep the T of the trace.
        batch_first: whether the batch has N before T.

    Raises:
        ValueError: if a value is not one of 0 .. T, when the program runs.
        NotImplementedError: under torch.func.linearize.
    """
    refuse_traced_tangents()
    if onnx_export.wanted():
        raise NotImplementedError(onnx_export.LENGTHS)
    batch_sizes, positions, order, places = torch.ops.fused_rnn.ragged(lengths, padded.detach(), batch_first)
    return Ragged(Steps(batch_sizes.shape[0], lengths.shape[0], batch_sizes), positions, order, places)


@quietly
def resets_by_direction(reset: Tensor, steps: Steps, directions: int) -> Tensor:
    """As ``fused_rnn.data.sequences.resets_by_direction``."""
    if steps.batch_sizes is None or directions == 1:
        return sequences.resets_by_direction(reset, steps, directions)
    reset = reset.contiguous()
    return torch.stack((reset, torch.ops.fused_rnn.one_step_earlier(reset, steps.batch_sizes)))


def _ragged(lengths: Tensor, padded: Tensor, batch_first: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    length = padded.shape[1 if batch_first else 0]
    found = Ragged.found(sequences.check_length_values(lengths, length), length, batch_first, padded.device)
    return found.steps.batch_sizes, found.positions, found.order, found.places


def _ragged_fake(lengths: Tensor, padded: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    longest, rows = context.new_dynamic_size(min=1), context.new_dynamic_size()
    batch_sizes = torch.empty(longest, dtype=torch.int64, device="cpu")
    positions = torch.empty(rows, dtype=torch.int64, device=padded.device)
    order, places = (torch.empty(lengths.shape, dtype=torch.int64, device=padded.device) for _ in range(2))
    return batch_sizes, positions, order, places


def _one_step_earlier_fake(reset: Tensor, batch_sizes: Tensor) -> Tensor:
    return torch.empty_like(reset)


def packed_reset(reset: PackedSequence, input: PackedSequence) -> Tensor:
    """The rows of a packed mask; whether it is packed as the input is, is checked when the program runs."""
    rows: Tensor = torch.ops.fused_rnn.packed_reset(
        reset.data, reset.batch_sizes, reset.sorted_indices, input.batch_sizes, input.sorted_indices
    )
    return rows


def _packed_reset(
    reset: Tensor, sizes: Tensor, order: Tensor | None, input_sizes: Tensor, input_order: Tensor | None
) -> Tensor:
    sequences.check_packed_alike(sizes, order, input_sizes, input_order)
    return reset.clone()


def _packed_reset_fake(
    reset: Tensor, sizes: Tensor, order: Tensor | None, input_sizes: Tensor, input_order: Tensor | None
) -> Tensor:
    return torch.empty_like(reset)


def _check_batch_sizes(batch_sizes: Tensor, data: Tensor, order: Tensor | None, state: Tensor | None) -> Tensor:
    sequences.check_batch_sizes(batch_sizes, data.shape[0])
    batch = int(batch_sizes[0])
    for found in (None if order is None else order.shape[0], None if state is None else state.shape[1]):
        if found is not None and found != batch:
            raise RuntimeError(f"Expected hidden states of {batch} packed sequences, got {found}")
    return batch_sizes.clone()


def _check_batch_sizes_fake(batch_sizes: Tensor, data: Tensor, order: Tensor | None, state: Tensor | None) -> Tensor:
    return torch.empty_like(batch_sizes)


def _weights(tensors: Sequence[Any], present: Sequence[int]) -> tuple[Weights, ...]:
    """The D ``Weights`` of a list without absent tensors."""
    found = iter(tensors)
    flat: list[Any] = [next(found) if there else None for there in present]
    each = len(Weights._fields)
    return tuple(Weights(*flat[first : first + each]) for first in range(0, len(flat), each))


def steps_of(input: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None) -> Steps:
    """The steps of an operator's arguments, whose values are there."""
    batch = states[0].shape[1]
    if batch_sizes is None:
        return Steps(input.shape[0] // batch if batch else 0, batch)
    return Steps.packed(batch_sizes, batch)


# The backend of a forward is the backend of its backward, which may run in another thread and outside of the `with` that chose
# it. The name travels on the memory that the backward reads, because an operator gives back tensors alone.
_BACKEND = "_fused_rnn_backend"


def _remember(kept: Tensor, backend: Backend) -> None:
    setattr(kept.untyped_storage(), _BACKEND, backend.name)


def _remembered(kept: Tensor, cell: Cell) -> Backend:
    """The backend of the forward; that in force now where something copied what it left (offloaded memory, say)."""
    name = getattr(kept.untyped_storage(), _BACKEND, None)
    if name is None:
        return dispatch.choose(kept.device, cell)
    with dispatch.backend(name):
        return dispatch.choose(kept.device, cell)


@autocast.without
def _forward(
    cell_name: str,
    input: Tensor,
    states: list[Tensor],
    tensors: list[Tensor],
    present: list[int],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: list[int],
    keep: bool,
    cell_states: bool,
) -> list[Tensor]:
    """Run the forward.

    Returns:
        [out, the states after the walk, c of every step if asked for, the tape, which is empty where it is not kept or is out].
    """
    cell, weights = named(cell_name), _weights(tensors, present)
    if input.shape[0] == 0 or tensors[0].shape[0] == 0:
        outputs = _forward_fake(cell_name, input, states, tensors, present, batch_sizes, reset, reverse, keep, cell_states)
        passed = (state.clone(memory_format=torch.contiguous_format) for state in states)
        return [outputs[0], *passed, *outputs[1 + len(states) :]]
    backend, steps = dispatch.choose(input.device, cell), steps_of(input, states, batch_sizes)
    call = LayerCall(Layer(cell, backend, steps, tuple(map(bool, reverse)), cell_states), input, tuple(states), weights, reset)
    dispatch.check_supported(call)
    out, ends, cells, tape = backend.forward(call, keep)
    if keep:
        _remember(out if tape is None else tape, backend)
    return [out, *ends, *(() if cells is None else (cells,)), input.new_empty(0) if tape is None else tape]


def _forward_fake(cell_name: str, input: Tensor, states: list[Tensor], tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *_, reverse, keep, cell_states = rest
    cell, hh = named(cell_name), tensors[1]
    rows, recurrences = input.shape[0], len(reverse)
    out = input.new_empty((rows, recurrences * hh.shape[1]))
    ends = [state.new_empty(state.shape) for state in states]
    hidden = hh.shape[0] // cell.num_gates
    if cell_states:
        ends.append(input.new_empty((rows, recurrences * hidden)))
    if not keep or cell.tape_is_out:
        return [out, *ends, input.new_empty(0)]
    return [out, *ends, input.new_empty((rows, recurrences, len(cell.tape) * hidden))]


@autocast.without
def _gradients(
    cell_name: str,
    input: Tensor,
    states: list[Tensor],
    tensors: list[Tensor],
    present: list[int],
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    reverse: list[int],
    out: Tensor,
    tape: Tensor,
    d_outputs: list[Tensor],
    given: list[int],
    wanted: list[int],
) -> list[Tensor]:
    """Run the backward. Returns the gradients that ``wanted`` (input, states, weights) names, in that order."""
    cell, weights = named(cell_name), _weights(tensors, present)
    if input.shape[0] == 0 or tensors[0].shape[0] == 0:
        # No step: the states are passed through, and nothing else counts.
        ends = spread(d_outputs, given)[1 : 1 + len(states)]
        through = [torch.zeros_like(s) if d is None else d.clone() for s, d in zip(states, ends, strict=True)]
        zeros = (torch.zeros_like(tensor) for tensor in tensors)
        return [grad for grad, asked in zip((torch.zeros_like(input), *through, *zeros), wanted, strict=True) if asked]
    backend = _remembered(out if cell.tape_is_out else tape, cell)
    d_out, *d_ends = spread(d_outputs, given)
    cell_states = len(d_ends) > len(states)
    described = Layer(cell, backend, steps_of(input, states, batch_sizes), tuple(map(bool, reverse)), cell_states)
    call = LayerCall(described, input, tuple(states), weights, reset)
    kept_tape = None if cell.tape_is_out else tape
    gradients = OutputGradients(d_out, d_ends[: len(states)], d_ends[-1] if cell_states else None)
    flags = iter(wanted)
    there = [1] * (1 + len(states)) + list(present)
    found = backend.backward(call, out, kept_tape, gradients, [bool(next(flags)) if each else False for each in there])
    return [grad for grad in found if grad is not None]


def _gradients_fake(_: str, input: Tensor, states: list[Tensor], tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    into, wanted = (input, *states, *tensors), rest[-1]
    return [tensor.new_empty(tensor.shape) for tensor, asked in zip(into, wanted, strict=True) if asked]


def spread(tensors: Sequence[_T], given: Sequence[int]) -> list[_T | None]:
    """Put tensors back in their places, with None in the others."""
    found = iter(tensors)
    return [next(found) if there else None for there in given]


# For every device: one that no backend serves is refused by the dispatch table, in its words.
library.impl("layer_forward", _forward, "CompositeExplicitAutograd")
library.impl("layer_backward", _gradients, "CompositeExplicitAutograd")
library.impl("check_batch_sizes", _check_batch_sizes, "CompositeExplicitAutograd")
library.impl("packed_reset", _packed_reset, "CompositeExplicitAutograd")
library.impl("ragged", _ragged, "CompositeExplicitAutograd")
library.impl("one_step_earlier", sequences.one_step_earlier, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::layer_forward", _forward_fake, lib=library)
torch.library.register_fake("fused_rnn::layer_backward", _gradients_fake, lib=library)
torch.library.register_fake("fused_rnn::check_batch_sizes", _check_batch_sizes_fake, lib=library)
torch.library.register_fake("fused_rnn::packed_reset", _packed_reset_fake, lib=library)
torch.library.register_fake("fused_rnn::ragged", _ragged_fake, lib=library)
torch.library.register_fake("fused_rnn::one_step_earlier", _one_step_earlier_fake, lib=library)
