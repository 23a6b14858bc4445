"""The evaluation harness: models served by vLLM, scored by lm-evaluation-harness. Imports nothing of the plugin.

It lives in an environment of its own (``make eval-install``): vLLM needs newer packages than LLaMA-Factory admits.
"""
