"""Whole training jobs on real input, each trained once with torch.nn and once with fused_rnn."""
