"""One open recipe for GPT-4o-style models in readable JAX/Flax."""

__version__ = "0.1.0"
