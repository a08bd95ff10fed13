"""The head: a CC0 mesh with 52 ARKit face units, its named regions, and how far its mouth is open."""

from jambatalk.face.mesh import ARKIT_UNITS, Head, MissingPackage, load_head
from jambatalk.face.mouth import inner_lip_gap, opening
from jambatalk.face.regions import PARTS

__all__ = ["ARKIT_UNITS", "Head", "MissingPackage", "PARTS", "inner_lip_gap", "load_head", "opening"]
