"""RNN with tanh and with relu on the C++ backend (kernels: csrc/rnn.h; contract: ``fused_rnn.kernels``)."""

from fused_rnn.kernels.cpp.call import kernels_of

rnn_tanh_pack, rnn_tanh_forward, rnn_tanh_backward = kernels_of("rnn_tanh")
rnn_relu_pack, rnn_relu_forward, rnn_relu_backward = kernels_of("rnn_relu")
