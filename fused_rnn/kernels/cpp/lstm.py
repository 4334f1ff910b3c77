"""LSTM on the C++ backend (kernels: csrc/lstm.h; contract: ``fused_rnn.kernels``)."""

from fused_rnn.kernels.cpp.call import kernels_of

lstm_pack, lstm_forward, lstm_backward = kernels_of("lstm")
