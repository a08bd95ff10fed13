"""Causal depthwise convolution: ``reference.py`` is the definition, ``op.py`` the public functions and their wiring."""
