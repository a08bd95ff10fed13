"""A synthetic talking-face corpus in the layout of the VOCASET release.

text -> speech with phone times (`speech`) -> coarticulated ARKit curves (`articulation`) -> vertices of a CC0 head
(`jambatalk.face`) -> the folder (`corpus`, the place to start). The command is `python -m jambatalk.synthesize`.
"""
