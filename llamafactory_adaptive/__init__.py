"""Adaptive-rank (Q)LoRA fine-tuning as a plugin of LLaMA-Factory.

This module stays empty of imports on purpose: the start-up hook imports it in every interpreter of the environment.
"""

__version__ = "0.1.0"
