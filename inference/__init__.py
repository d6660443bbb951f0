"""How posteriors of Pyro programs are found: SVGD, SVI and NUTS on one bridge from Pyro."""

if not __name__.startswith("bayesattn."):
    raise ImportError(
        f"import bayesattn.inference, not {__name__}: under two names Python would load two copies"
    )

__all__: list[str] = []
