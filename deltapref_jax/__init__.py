"""deltapref-jax: what makes a preference pair worth training on?"""

__version__ = "0.1.0"
