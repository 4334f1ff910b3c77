"""``python -m benchmarks gpu``: the Triton kernels on a CUDA device, correctness first, then times against torch.nn (cuDNN).

Reading order: ``cases`` (what is measured, as data), ``problem`` (one layer with its numbers, and who can run it), ``gate``
(what is right) and ``judging`` (in processes side by side), ``clock``, ``graphs`` and ``floors`` (the instruments), ``peers``
(who else is timed), ``timed`` (one case), ``run`` (puts them together), ``tune`` (writes the table that the plan reads),
``report`` (what is shown), ``command``.

Everything takes a device and a backend, so that all but CUDA's clock and graphs and the barrier's cost runs on a CPU too, in
the tests.
"""
