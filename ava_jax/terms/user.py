"""A user's own terms: subclasses of the base classes, or objects of the same form."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from ava_jax.inputs import LossInputs
from ava_jax.kernel.stats import TokenStats
from ava_jax.ranges import check_fields, check_range, check_weight
from ava_jax.terms.base import (
    LogitsTerm,
    Step,
    Term,
    TokenInputs,
    TokenTerm,
    is_own,
)


@runtime_checkable
class ExtraTerm(Protocol):
    """A token term with its state as an argument; `TokenTerm` is the newer form.

    `weight · mean_w(apply(...))` is part of the loss and reported in `aux` under
    `name`. Two members are optional: `weight`, a number or a schedule of the step (1
    without it), and `update(state, mean)`, which returns the state after a training
    step whose unweighted mean is given.

    Example:
      >>> import dataclasses, jax.numpy as jnp, ava_jax
      >>> @dataclasses.dataclass(frozen=True)
      ... class ConfidencePenalty:
      ...     name: str = "confidence_penalty"
      ...     weight: float = 0.1
      ...     def init(self):
      ...         return ()
      ...     def apply(self, state, stats, inputs):
      ...         return -stats.entropy
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8)
      >>> loss_fn = ava_jax.unified_loss(config, extra_terms=(ConfidencePenalty(),))
      >>> _, aux, _ = loss_fn(loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
      ...                     targets=jnp.array([[1, 2, 3, 4]]))
      >>> round(float(aux["confidence_penalty"]), 4)
      -0.2079
    """

    @property
    def name(self) -> str:
        """The key in `aux` and in `state.extra`."""
        ...

    def init(self) -> Any:
        """Returns the term's state, a pytree of arrays; `()` for none."""
        ...

    def apply(
        self, state: Any, stats: TokenStats, inputs: TokenInputs
    ) -> Float[Array, "B S"]:
        """Returns the value per token of a block; masked tokens are left out."""
        ...


# What a term may have besides its name and its call.
_OPTIONAL = tuple(name for name in dir(TokenTerm) if not name.startswith("_"))


@dataclasses.dataclass(frozen=True)
class _Adapted(TokenTerm):
    """An object of one of the two forms that is not derived from `TokenTerm`."""

    term: Any

    def __post_init__(self) -> None:
        for name in ("name", *_OPTIONAL):
            if name != "update" and hasattr(self.term, name):
                object.__setattr__(self, name, getattr(self.term, name))

    def __call__(self, stats: TokenStats, inputs: TokenInputs) -> Float[Array, "B S"]:
        if isinstance(self.term, ExtraTerm):
            return self.term.apply(inputs.state, stats, inputs)
        return self.term(stats, inputs)

    def update(self, state: Any, statistics: Any, step: Step) -> Any:
        update = getattr(self.term, "update", None)
        if update is None:
            return state
        if isinstance(self.term, ExtraTerm):
            return update(state, statistics)
        return update(state, statistics, step)


TermLike = Term | ExtraTerm | Callable[..., Array]


def as_term(term: TermLike) -> Term:
    """Returns a user's term in the form of the built-in ones.

    Raises:
      TypeError: it has neither form, has no name, or cannot be hashed.
      ValueError: its `logits_temperature` is out of range.
    """
    if isinstance(term, type):
        raise TypeError(f"{term.__name__} is a class: pass a term, {term.__name__}(…)")
    if not isinstance(term, Term):
        if not isinstance(term, ExtraTerm) and not callable(term):
            raise TypeError(
                f"{term!r} is not a term: derive it from ava_jax.TokenTerm or "
                "ava_jax.BatchTerm, or give it what ava_jax.ExtraTerm has"
            )
        term = _Adapted(term)
    name = getattr(term, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"term {term!r} needs a name, its key in aux; got {name!r}")
    if not is_own(term):
        check_fields(term, f"term {name!r}: ")
    try:
        hash(term)
    except TypeError as error:
        raise TypeError(
            f"term {name!r} must be hashable, a frozen dataclass for example"
        ) from error
    _check_attributes(term)
    return term


_LISTS = (
    "requires",
    "accepts",
    "requires_extra",
    "accepts_extra",
    "columns_extra",
    "keys",
    "measured",
)


def _check_attributes(term: Term) -> None:
    """Raises on attributes that would be half understood, or ignored."""
    known = LossInputs.__annotations__
    for attribute in _LISTS:
        names = getattr(term, attribute, ()) or ()
        is_list = isinstance(names, tuple | list)
        if not is_list or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"term {term.name!r}: {attribute} must be a tuple of names, such as "
                f"('reward',), got {names!r}"
            )
        unknown = [name for name in names if name not in known]
        if attribute in ("requires", "accepts") and unknown:
            raise ValueError(
                f"term {term.name!r}: {attribute} names no argument of a call, got "
                f"{unknown[0]!r}; there are {', '.join(known)}"
            )
    if term.part is not None and not isinstance(term.part, str):
        raise TypeError(
            f"term {term.name!r}: part must be a key of aux or None, got {term.part!r}"
        )
    check_weight(f"term {term.name!r}: weight", term.weight)
    if not isinstance(term, TokenTerm):
        return
    if term.source not in known:
        raise ValueError(
            f"term {term.name!r}: source must be an argument of a call, got "
            f"{term.source!r}"
        )
    what = f"term {term.name!r}: logits_temperature"
    check_range(what, term.logits_temperature, 0, inclusive=False)
    if isinstance(term, LogitsTerm) and term.measured:
        raise ValueError(
            f"term {term.name!r}: a term of logits measures nothing, got measured="
            f"{term.measured}: report it from a term of its own"
        )
