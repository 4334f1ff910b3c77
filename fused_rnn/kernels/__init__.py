"""The backends: what each of them does is said in ``fused_rnn.kernels.protocol``."""
