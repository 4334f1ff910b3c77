"""Who is measured. A peer is one file here and one line in ``PEERS``.

A peer that cannot run, or cannot run a case, gives the reason, and the results hold a row with it.
"""

from __future__ import annotations

from benchmarks.peers import cell_loop, fused, int8, jax_scan, onnx_runtime, torch_nn
from benchmarks.peers.base import Peer, Provider

OURS = "ours"
DEFAULT = ("torch", "onnxruntime")


def peers(backend: str | None = None) -> dict[str, Peer]:
    """Every known peer by name; ours first.

    Args:
        backend: what serves "ours", or None for the automatic choice.
    """
    table = (
        fused.peer(OURS, backend),
        torch_nn.PEER,
        onnx_runtime.PEER,
        fused.peer("numba", "numba"),
        fused.peer("cpp", "cpp"),
        fused.peer("reference", "reference"),
        fused.peer("triton", "triton"),
        torch_nn.COMPILED,
        torch_nn.ALLOWED,
        cell_loop.PEER,
        cell_loop.COMPILED,
        jax_scan.PEER,
        int8.PEER,
        int8.OUR_PEER,
    )
    return {peer.name: peer for peer in table}


__all__ = ["DEFAULT", "OURS", "Peer", "Provider", "peers"]
