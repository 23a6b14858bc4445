"""Comparison of ways to fine-tune: the same data, budget and seeds for each, at the learning rate that suits it.

To read: ``arms`` (what is compared, and the settings of a run), ``experiment`` (which runs are due), ``ledger`` (what
came of each), ``runner`` and ``device_loop`` (how they are made); then ``results`` (what becomes of them all), which
leads to ``losses``, ``differences`` (with ``rate_choice``) and ``verdicts``, which are the statistics (``more_seeds``
where nothing is decided), then to ``words`` and ``pages``. Files that begin with ``task`` are the same for answers in
place of losses. ``request``, ``starts`` and ``secrets`` are about the command itself. What trains is in ``bridge``:
docs/architecture.md walks from the YAML to a verdict.
"""
