"""Attention as generative models: Pyro programs and the closed forms that they admit."""

if not __name__.startswith("bayesattn."):
    raise ImportError(
        f"import bayesattn.models, not {__name__}: under two names Python would load two copies"
    )

__all__: list[str] = []
