"""Everything that can be measured; importing this fills the registry."""

from registry import REGISTRY

from implementations import decode, dense, fla, nsa, prefill

__all__ = ["REGISTRY", "decode", "dense", "fla", "nsa", "prefill"]
