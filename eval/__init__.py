"""The evaluation harness: models served by vLLM, scored by lm-evaluation-harness. Imports nothing of the plugin.

It has an environment of its own (``make eval-install``): vLLM needs newer packages than LLaMA-Factory allows.
"""
