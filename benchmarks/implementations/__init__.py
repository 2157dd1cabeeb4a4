"""Everything that can be measured; importing this fills the registry."""

from registry import REGISTRY

from implementations import dense, fla, nsa

__all__ = ["REGISTRY", "dense", "fla", "nsa"]
