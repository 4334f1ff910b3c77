"""Where a layer's weights are found at each call: among its parameters and attributes, or in the list ``_flat_weights``.

torch.nn computes with that list, which follows the attributes. So a list that somebody assigned counts (low-rank adapters and
hyper-networks do that), and so does an item of it, until one of the attributes is another tensor: then all attributes are
listed anew. Here a list exists only where somebody looked at it. It is no second place in which tensors live on that a
parametrization, a shard or a reassignment has replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fused_rnn.data.cell import Weights


class FlatWeights(torch.nn.RNNBase):
    """What RNN, LSTM and GRU share."""

    # The list that was given out or assigned, and the attributes of that time; None where they are read themselves.
    _given_weights: list[Any] | None = None
    _given_for: list[Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # By name: between the two there may be a class of torch.nn, whose constructor has other arguments.
        torch.nn.RNNBase.__init__(self, *args, **kwargs)

    def flatten_parameters(self) -> None:
        """Do nothing: no kernel needs the parameters next to each other. Here so that callers of torch.nn's keep working."""

    @property
    def _flat_weights(self) -> list[Any]:
        current = self._attributes()
        given = self._in_step(current)
        if given is not None:
            return given
        # A parametrized weight is another tensor at every look, and so counts whatever its list says. Nor does a traced call
        # leave its tensors in the module.
        if not torch.compiler.is_compiling() and not parametrize.is_parametrized(self):
            vars(self).update(_given_weights=current, _given_for=list(current))
        return current

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        vars(self).update(_given_weights=value, _given_for=self._attributes())

    def _init_flat_weights(self) -> None:
        # Called by RNNBase where all parameters are others: in the constructor, and by `_apply`.
        self._forget_given()

    def overriding(self) -> list[Any] | None:
        """The list ``_flat_weights`` where the module computes with other tensors than its attributes; else None."""
        if self._given_weights is None:
            return None
        current = self._attributes()
        given = self._in_step(current)
        return None if given is None or _same(given, current) else given

    def _forget_given(self) -> None:
        vars(self).pop("_given_weights", None)
        vars(self).pop("_given_for", None)

    def _weights_have_changed(self) -> bool:
        return self._given_weights is not None and self._in_step(self._attributes()) is None

    def __setattr__(self, name: str, value: Any) -> None:
        # RNNBase would write to its list. Here a new attribute is noticed where the list is read.
        torch.nn.Module.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key not in _LIST}
        given = self.overriding()
        if given is not None:
            state["_flat_weights"] = given
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = state.get("_flat_weights")
        super().__setstate__({key: value for key, value in state.items() if key != "_flat_weights"})  # type: ignore[no-untyped-call]
        # RNNBase looked at the list.
        self._forget_given()
        if given is not None and not _same(given, self._attributes()):
            self._flat_weights = given

    def _replicate_for_data_parallel(self) -> Any:
        # RNNBase would copy a list, which the replica's parameters take the place of.
        replica = torch.nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        replica._forget_given()
        replica._flat_weights_names = replica._flat_weights_names[:]
        return replica

    def _attributes(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _in_step(self, current: list[Any]) -> list[Any] | None:
        """The given list, unless an attribute is another tensor than it was then; one that is gone by now is no other."""
        if self._given_weights is None or self._given_for is None:
            return None
        for now, then in zip(current, self._given_for, strict=True):
            if now is not then and now is not None:
                return None
        return self._given_weights

    def _weights(self) -> list[Weights]:
        names, get = self._flat_weights_names, self._parameters.get
        if len(names) == 4 and self.bias and self._given_weights is None:
            # Of one layer in one direction, in line: a small layer's call takes little longer than this.
            ih, hh, bias_ih, bias_hh = get("weight_ih_l0"), get("weight_hh_l0"), get("bias_ih_l0"), get("bias_hh_l0")
            if ih is not None and hh is not None and bias_ih is not None and bias_hh is not None:
                return [tuple.__new__(Weights, (ih, hh, bias_ih, bias_hh, None))]
        tensors: list[Any] = [get(name) for name in names]
        if self._given_weights is None:
            for tensor in tensors:
                if tensor is None:
                    # A parametrized, pruned or reassigned weight is an attribute, not a parameter.
                    tensors = [getattr(self, name) for name in names]
                    break
        else:
            tensors = self._given(tensors)
        each = 2 + 2 * self.bias + (self.proj_size > 0)
        weights = []
        for first in range(0, len(tensors), each):
            one = tensors[first : first + each]
            if not self.bias:
                one[2:2] = (None, None)
            weights.append(Weights(*one))
        return weights

    def _given(self, parameters: list[Any]) -> list[Any]:
        """The weights of a module whose list somebody has seen."""
        current = [
            getattr(self, name, None) if parameter is None else parameter
            for name, parameter in zip(self._flat_weights_names, parameters, strict=True)
        ]
        given = self._in_step(current)
        tensors = current if given is None else given
        if len(tensors) != len(current):
            raise ValueError(f"_flat_weights: expected {len(current)} tensors, {self._flat_weights_names}, got {len(tensors)}")
        for name, tensor in zip(self._flat_weights_names, tensors, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"_flat_weights: expected a tensor for {name}, got {type(tensor).__name__}")
        return list(tensors)


# What an instance keeps of a list; `_flat_weight_refs` is RNNBase's.
_LIST = ("_given_weights", "_given_for", "_flat_weight_refs")


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
