"""Marks of what torch 2.6, the oldest that the package asks for, does not have; each says what that is."""

import pytest
import torch

_OLD = torch.__version__ < (2, 7)

dynamo_with_values = pytest.mark.skipif(
    _OLD, reason="torch.compile of torch 2.6 traces neither a PackedSequence nor an operator with a result of unknown size"
)
shards_on_the_cpu = pytest.mark.skipif(_OLD, reason="fully_shard of torch 2.6 needs an accelerator")
checks_of_2_13 = pytest.mark.skipif(_OLD, reason="torch.nn of 2.6 checks less than that of 2.13, and in other words")
