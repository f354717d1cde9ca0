"""The reference numbers of post-training: loading and comparing.

`golden/posttrain.json` lists the cases and `golden/posttrain.npz` holds their arrays as
`NAME/GROUP/KEY`; the groups are `in`, `out` and `grad`. What each kind calls is the
business of the tests.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import ava_jax
from support.golden_cases import FOLDER, assert_close, on_device

FLOAT32 = 2e-5
FLOAT64 = 1e-8

Arrays = Mapping[str, Any]
# From `in` and `config` to `out`; the gradient of `loss` is compared.
Call = Callable[[Arrays, dict[str, Any]], Mapping[str, jax.Array]]


@dataclass(frozen=True)
class PostTrainingCase:
    """One case; `arrays[group][key]`."""

    name: str
    kind: str
    config: dict[str, Any]
    arrays: dict[str, dict[str, NDArray]]


@functools.cache
def post_training_cases() -> tuple[PostTrainingCase, ...]:
    """All 111 cases, in the order of the list."""
    listed = json.loads((FOLDER / "posttrain.json").read_text())
    arrays: dict[str, dict[str, dict[str, NDArray]]] = {}
    with np.load(FOLDER / "posttrain.npz") as stored:
        for path in stored.files:
            name, group, key = path.split("/", 2)
            arrays.setdefault(name, {}).setdefault(group, {})[key] = stored[path]
    return tuple(
        PostTrainingCase(**case, arrays=arrays[case["name"]]) for case in listed
    )


def post_training_cases_of(*kinds: str) -> list[PostTrainingCase]:
    """The cases of the given kinds."""
    return [case for case in post_training_cases() if case.kind in kinds]


def run(case: PostTrainingCase, call: Call) -> tuple[Arrays, Arrays]:
    """(out, grad) of a case: what `call` returns, and the gradient of its `loss`."""
    inputs = on_device(case.arrays["in"])
    trained = {key: inputs[key] for key in case.arrays["grad"]}

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def both(trained: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
        out = call({**inputs, **trained}, dict(case.config))
        return out["loss"], out

    grad, out = both(trained, inputs)
    return out, grad


# From log-probabilities, `in` and `config` to the loss.
LossOfLogProbs = Callable[[jax.Array, Arrays, dict[str, Any]], jax.Array]


def run_of_log_probs(
    case: PostTrainingCase, loss: LossOfLogProbs
) -> tuple[Arrays, Arrays]:
    """(out, grad) of a case whose loss is one of log-probabilities.

    They and their gradient are two programs that all cases of a shape share.
    """
    inputs, config = on_device(case.arrays["in"]), dict(case.config)
    temperature = on_device(np.asarray(config.pop("temperature", 1.0)))
    trained = {key: inputs[key] for key in case.arrays["grad"]}
    given = (trained, inputs["targets"], temperature)

    @jax.jit
    @jax.value_and_grad
    def value_and_slope(log_probs: jax.Array, inputs: Arrays) -> jax.Array:
        return loss(log_probs, inputs, dict(config))

    value, slope = value_and_slope(_log_probs(*given), inputs)
    return {"loss": value}, _pull_back(*given, slope)


@jax.jit
def _log_probs(trained: Arrays, targets: jax.Array, temperature: jax.Array):
    return plain_log_probs({**trained, "targets": targets}, temperature)


@jax.jit
def _pull_back(
    trained: Arrays, targets: jax.Array, temperature: jax.Array, slope: jax.Array
) -> Arrays:
    _, pull = jax.vjp(lambda x: _log_probs(x, targets, temperature), trained)
    return pull(slope)[0]


def compare(case: PostTrainingCase, group: str, got: Arrays, tolerance: float) -> None:
    """Every stored entry of the group against `got`."""
    for key, want in case.arrays[group].items():
        assert_close(got[key], want, tolerance, f"{case.name} {group}/{key}")


def check(case: PostTrainingCase, call: Call, tolerance: float) -> None:
    """Runs a case, and compares values and gradients."""
    compare_both(case, run(case, call), tolerance)


def compare_both(
    case: PostTrainingCase, got: tuple[Arrays, Arrays], tolerance: float
) -> None:
    """Compares the values and the gradients of a run."""
    out, grad = got
    compare(case, "out", out, tolerance)
    compare(case, "grad", grad, tolerance)


def log_probs_case(**options: Any) -> Call:
    """The call of the cases of kind `log_probs`, with options of `token_log_probs`."""

    def call(inputs: Arrays, config: dict[str, Any]) -> dict[str, jax.Array]:
        arrays = {k: v for k, v in inputs.items() if not k.startswith("of_")}
        out = ava_jax.token_log_probs(**arrays, **config, **options)
        named = {name: getattr(out, name) for name in ("log_probs", "entropy", "log_z")}
        parts = (inputs[f"of_{name}"] * value for name, value in named.items())
        total = sum(parts, start=jnp.zeros_like(out.log_z))
        return {**named, "loss": jnp.sum(inputs["attention_mask"] * total)}

    return call


def plain_log_probs(inputs: Arrays, temperature: jax.Array) -> jax.Array:
    """The targets' log-probabilities, with the logits as one array."""
    logits = jnp.matmul(inputs["hidden_states"], inputs["lm_head"], precision="highest")
    every = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(every, inputs["targets"][..., None], -1)[..., 0]
