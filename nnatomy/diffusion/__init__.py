"""`DiffusionTransformer`: a pipeline of diffusers under standard names, step by step. It needs `pip install "nnatomy[diffusion]"`."""

from nnatomy.diffusion.transformer import DiffusionTransformer as DiffusionTransformer
