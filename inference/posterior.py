"""The posterior that a routine found: its draws, the program and the data that they belong to."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesattn.inference import prediction
from bayesattn.inference.draws import Draws
from bayesattn.inference.replay import Replay
from bayesattn.inference.sites import Site

if TYPE_CHECKING:
    import pandas  # noqa: ICN001 (the name that a type checker at run time can resolve)

__all__ = ["Posterior"]


class Posterior(Draws):
    """Draws of a program's latent sites, and what the program says at them.

    Args and attributes are those of :class:`~bayesattn.inference.draws.Draws`.
    """

    @functools.cached_property
    def training_sites(self) -> dict[str, Site]:
        """The program's sites at its training arguments."""
        return self.replay((), {}).sites

    @functools.cached_property
    def shared_discrete(self) -> list[str]:
        """Discrete sites that inference summed out and that the observed sites have in common."""
        if not (self.args or self.kwargs):
            return list(self.attrs.get("shared_discrete", []))
        replay = self.replay((), {})
        observed = {n for name in replay.names("observed") for n in replay.sites[name].plate_names}
        return [n for n in replay.summable if not observed & replay.sites[n].plate_names]

    def replay(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        seed: int | None = None,
        chunk_size: int | None = None,
    ) -> Replay:
        """Make the program ready to run at every draw, at the training arguments if none are given.

        Raises:
            ValueError: Without a model; if the program does not run at these arguments with these
                draws; or if a discrete site would need the training data to be drawn.
        """
        if self.model is None:
            raise ValueError(
                "this posterior has no model, so it cannot predict; a loaded one gets its model by "
                "Posterior.load(path, model=...)"
            )
        is_training = not args and not kwargs
        if is_training:
            args, kwargs = self.args, self.kwargs
        values = self.network_samples()
        rows = len(next(iter(values.values())))
        try:
            replay = Replay(
                self.model, args, kwargs, values, num_rows=rows, seed=seed, chunk_size=chunk_size
            )
        except ValueError as error:
            if args or kwargs:
                raise
            raise ValueError(
                f"{error}; this posterior knows no training arguments: give some, or keep them by "
                "posterior.replace(args=..., kwargs=...)"
            ) from error
        if not is_training and replay.summable:
            self._refuse_shared_discrete(replay.summable)
        return replay

    def predict(
        self,
        *args: Any,
        sites: Sequence[str] | None = None,
        num_draws: int | None = None,
        seed: int | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Run the program at every draw, and return what its other sites are there.

        Args:
            *args: Of the program, in place of all training arguments; without what is to be
                predicted, as in ``posterior.predict(tokens, mask)``.
            sites: Which sites; default, deterministic ones and those neither observed nor drawn.
            num_draws: Use so many draws of each chain, evenly spaced.
            seed: For what is random in the program.
            chunk_size: Most draws evaluated at once, to bound memory.
            **kwargs: Of the program.

        Returns:
            Site to ``(chain, draw, *shape)``; one draw a chain where draws are heads.

        Raises:
            ValueError: If a site is unknown, or a latent site has another shape at these arguments.
        """
        posterior = self if num_draws is None else self.thin(num_draws)
        replay = posterior.replay(args, kwargs, seed=seed, chunk_size=chunk_size)
        return posterior.by_chain(prediction.predict(replay, sites))

    def posterior_predictive(
        self,
        *args: Any,
        sites: Sequence[str] | None = None,
        num_draws: int | None = None,
        seed: int | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Replicates of the data: observed sites drawn anew at every draw.

        Arguments, result and errors are those of :meth:`predict`; by default the observed sites at
        the training arguments.
        """
        posterior = self if num_draws is None else self.thin(num_draws)
        replay = posterior.replay(args, kwargs, seed=seed, chunk_size=chunk_size)
        return posterior.by_chain(prediction.resample_observed(replay, sites))

    def log_likelihood(
        self,
        *args: Any,
        likelihood_sites: Iterable[str] = (),
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Log likelihood of each observation at each draw, in nats.

        Args:
            *args: Of the program, in place of all training arguments.
            likelihood_sites: Names of :func:`pyro.factor` sites that are likelihoods too.
            chunk_size: Most draws evaluated at once, to bound memory.
            **kwargs: Of the program.

        Returns:
            Observed site to ``(chain, draw, *batch_shape)``: event axes summed, masked entries
            zero, scales left out, all data of subsampled plates. Discrete sites are summed out.

        Raises:
            ValueError: If nothing is observed, or the likelihood is not one of single observations.
        """
        replay = self.replay(args, kwargs, seed=0, chunk_size=chunk_size)
        return self.by_chain(prediction.log_likelihood(replay, likelihood_sites))

    def to_arviz(
        self,
        *,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        sites: Sequence[str] | None = None,
        deterministic: bool | None = None,
        log_likelihood: bool | None = None,
        posterior_predictive: bool = False,
        prior_draws: int = 0,
        likelihood_sites: Iterable[str] = (),
        seed: int | None = None,
        chunk_size: int | None = None,
    ) -> Any:
        """Give all that is known as an ArviZ object, on either line of ArviZ.

        Axes are named by ``dims``, else by the program's attribute ``dims``, else by its plates;
        labels come from ``coords`` or the program's attribute ``coords``.

        Args:
            dims: Site, statistic or argument to names of its axes after chain and draw; a shorter
                list names the last axes.
            coords: Axis name to its labels.
            sites: Latent and deterministic sites to give; all by default.
            deterministic: Whether deterministic sites at the training arguments are given.
            log_likelihood: Whether the pointwise log likelihood of the training data is given.
            posterior_predictive: Whether replicates of the training data are given.
            prior_draws: Number of draws from the prior to give.
            likelihood_sites: Names of :func:`pyro.factor` sites that are likelihoods too.
            seed: For replicates and prior draws.
            chunk_size: Most draws evaluated at once, to bound memory.

        Returns:
            ``arviz.InferenceData`` with ArviZ 0.23, ``xarray.DataTree`` with ArviZ 1.

        Raises:
            ValueError: If names of axes do not fit, or what is asked for cannot be had. What is
                left at None is given where it can be had.
        """
        from bayesattn.inference import arviz_tree, export

        tree = export.tree(
            self,
            dims=dims,
            coords=coords,
            sites=sites,
            deterministic=deterministic,
            log_likelihood=log_likelihood,
            posterior_predictive=posterior_predictive,
            prior_draws=prior_draws,
            likelihood_sites=likelihood_sites,
            seed=seed,
            chunk_size=chunk_size,
        )
        return arviz_tree.to_arviz_object(tree)

    def summary(
        self,
        *,
        sites: Sequence[str] | None = None,
        reference: "Posterior | None" = None,
        **options: Any,
    ) -> "pandas.DataFrame":
        """Summarize each entry of each site by figures that mean something for these draws.

        Markov chains get ArviZ's whole summary. Others get its statistics, R-hat between runs where
        there are several, and Pareto's k of the worst run of a guide; never an effective sample
        size.

        Args:
            sites: Latent or deterministic sites; default, all latent ones.
            reference: Another posterior of the same sites, for the column ``sd_ratio``.
            **options: For :func:`arviz.summary`.

        Raises:
            ValueError: If a site is unknown, or missing or of another shape in ``reference``.
        """
        from bayesattn.inference import arviz_tree

        if reference is not None:
            self._check_reference(reference, self.draws if sites is None else sites)

        def data(posterior: Posterior) -> Any:
            return posterior.to_arviz(
                sites=sites, deterministic=sites is not None, log_likelihood=False
            )

        stats = self.sample_stats
        ratio = stats["lp"] - stats["log_q"] if {"lp", "log_q"} <= stats.keys() else None
        return arviz_tree.summarize(
            data(self),
            markov=self.draws_are == "markov",
            num_chains=self.num_chains,
            log_weights=None if ratio is None else ratio.cpu().numpy(),
            reference=None if reference is None else data(reference),
            **options,
        )

    def match(
        self,
        plate: str,
        *,
        by: Sequence[str] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> "Posterior":
        """Give exchangeable slices of a plate, such as heads, one order in all draws.

        Args:
            plate: Name of the plate.
            by: Sites in the plate whose values decide; all by default.
            blocks: Sites outside of the plate that have, along the given axis of their own shape,
                one block of entries per slice: they are put in order alike.

        Returns:
            A posterior in the new order; the permutation is ``sample_stats["head_permutation"]``
            (with the plate's name), entry k telling which old slice is the new slice k.
        """
        from bayesattn.inference import matching

        return matching.matched(self, plate, by=by, blocks=blocks or {})

    def save(self, path: str | Path, **arviz: Any) -> None:
        """Write to a file, whole or not at all.

        Args:
            path: With the suffix ``.nc`` (netCDF, which ArviZ opens) or ``.safetensors``.
            **arviz: For netCDF, what else the file holds; as in :meth:`to_arviz`.

        Raises:
            ValueError: If the suffix is another.
            OSError: If nothing can be written there.
        """
        from bayesattn.inference import storage

        storage.save(self, Path(path), **arviz)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "Posterior":
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            model: The program, without which there are no predictions. Training arguments are not
                kept: give them to :meth:`predict` and :meth:`log_likelihood`, or to the posterior
                itself by ``posterior.replace(args=...)``.

        Raises:
            ValueError: If the file is not one of ours.
        """
        from bayesattn.inference import storage

        return cls(**storage.load(Path(path)), model=model)

    def _check_reference(self, reference: "Posterior", sites: Iterable[str]) -> None:
        """Refuse a reference that lacks sites, or has them in other shapes."""
        shapes, others = (
            {name: tuple(value.shape[2:]) for name, value in posterior.draws.items()}
            for posterior in (self, reference)
        )
        unlike = {name: shapes[name] for name in sites if name in shapes}
        unlike = {name: shape for name, shape in unlike.items() if others.get(name) != shape}
        if unlike:
            raise ValueError(
                f"reference must have the same sites; it lacks {unlike} (site to shape) and has "
                f"{others}"
            )

    def _refuse_shared_discrete(self, names: Sequence[str]) -> None:
        """Refuse sites whose distribution at other arguments hangs on the training data."""
        shared = sorted(set(names).intersection(self.shared_discrete))
        if shared:
            raise ValueError(
                f"discrete sites {shared} were summed out given the training data and lie in no "
                "plate of an observed site, so what they are at other arguments is not known; "
                "leave the arguments out to use the training data"
            )
