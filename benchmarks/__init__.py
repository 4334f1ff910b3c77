"""The benchmark: fused_rnn against torch.nn and ONNX Runtime on your own machine.

``python -m benchmarks`` measures; ``report`` after it makes a page with pictures of the results, ``compare`` judges two of
them, ``readme`` writes the README's tables and the page in ``results/``, ``show`` prints the tables again.

Reading order: ``cases`` and ``sets`` (what is measured), ``goals`` (what is to be reached), ``peers`` (who is measured),
``problem`` and ``gate`` (same numbers for all, and a check of the results), ``timing``, ``floors``, ``memory`` (the
instruments), ``suite`` (puts them together), ``results`` and ``json_file`` (the file), ``report``, ``scaling``, ``figures``,
``page`` and ``compare`` (what is shown), ``readme``, ``plots``, ``jobs`` and ``readme_files`` (what is committed).
``test_speed`` is for pytest-benchmark.

Legend: B sequences, T steps, I input features, H hidden units, G gates.
"""
