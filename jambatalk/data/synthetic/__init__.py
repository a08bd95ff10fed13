"""A synthetic talking-face corpus in the layout of the VOCASET release: text -> speech with phone times -> coarticulated
ARKit curves -> vertices of a CC0 head. Start at `corpus.py`; the command is `python -m jambatalk.synthesize`."""
