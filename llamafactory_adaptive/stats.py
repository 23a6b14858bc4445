"""Streaming moments of activations and of importances, and the metrics built on them. torch only.

Shape suffixes: ``_N`` input features of one module, ``_T`` tokens, ``_M`` modules.
"""
