"""The paper's tables: every method on the same data, with the same time to learn.

`python -m jambatalk.tables --help`
"""
