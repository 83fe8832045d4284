"""Plots, tables, and one self-contained HTML page. It receives plain data and knows no other room."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
