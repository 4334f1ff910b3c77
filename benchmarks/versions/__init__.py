"""Two versions of fused_rnn and torch.nn, measured in one run: a process each, kept alive, that take turns.

``worker`` is such a process, ``processes`` its other end, ``run`` leads both through the cases, ``report`` makes Markdown of
the rows, ``command`` is the command.
"""
