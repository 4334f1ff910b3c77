"""The benchmark: fused_rnn against torch.nn and ONNX Runtime on your own machine.

``python -m benchmarks`` measures, ``python -m benchmarks readme RESULTS.json`` writes the README's table and picture.

Reading order: ``cases`` and ``sets`` (what is measured), ``goals`` (what is to be reached), ``peers`` (who is measured), ``problem`` and
``gate`` (same numbers for all, and a check of the results), ``timing``, ``floors``, ``memory`` (the
instruments), ``suite``
(puts them together), ``results`` (the file), ``report`` and ``plots`` (what is shown).

Legend: B sequences, T steps, I input features, H hidden units, G gates.
"""
