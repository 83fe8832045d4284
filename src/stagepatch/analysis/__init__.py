"""What a patch has learned, and where."""

from stagepatch.analysis.activation import gate_activation

__all__ = ["gate_activation"]
