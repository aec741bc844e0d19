"""steppe: which optimizer makes my model generalise, what does it cost, and why?"""

__version__ = "0.1.0"
