"""GRU on the C++ backend (kernels: csrc/gru.h; contract: ``fused_rnn.kernels``)."""

from fused_rnn.kernels.cpp.call import kernels_of

gru_pack, gru_forward, gru_backward = kernels_of("gru")
