"""Mamba-1 selective scan: ``reference.py`` is the definition, ``op.py`` the public functions and their wiring."""
