"""The reference numbers: loading, calling what each kind says, comparing.

`golden/public.json` lists the cases and `golden/public.npz` holds their arrays as
`NAME/STEP/GROUP/KEY`; the groups are `in`, `out`, `grad` (first step) and `state`.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

import ava_jax
from ava_jax import losses

FOLDER = Path(__file__).parents[1] / "golden"
# Below this a number is rounding noise: the smallest stored weight times 1e-4.
SMALLEST = 1e-8
HEAD_KINDS = ("confidence_gate", "mtp_heads")

Arrays = dict[str, NDArray]
Numbers = Mapping[str, Any]
Group = dict[str, Arrays]


@dataclass(frozen=True)
class GoldenCase:
    """One case; `arrays[step][group][key]`."""

    name: str
    kind: str
    config: dict[str, Any]
    arrays: tuple[Group, ...]

    @property
    def masked(self) -> bool:
        """Whether some position is masked at some step."""
        masks = [step["in"].get("attention_mask") for step in self.arrays]
        return any(mask is not None and not mask.all() for mask in masks)

    def skipped(self) -> tuple[str, ...]:
        """Prefixes of `group/key` that the case's note says not to compare."""
        if self.name == "focal_reported":
            return ("out/main_loss", "out/total_loss", "grad", "state")
        if self.name.startswith("repetition_") and self.masked:
            unfit = ("token_diversity", "ngram_penalty", "total_loss")
            return (*(f"out/{key}" for key in unfit), "grad")
        return ()


@functools.cache
def golden_cases() -> tuple[GoldenCase, ...]:
    """All 151 cases, in the order of the list."""
    listed = json.loads((FOLDER / "public.json").read_text())
    arrays: dict[str, dict[int, Group]] = {}
    with np.load(FOLDER / "public.npz") as stored:
        for path in stored.files:
            name, step, group, key = path.split("/", 3)
            groups = arrays.setdefault(name, {}).setdefault(int(step), {})
            groups.setdefault(group, {})[key] = stored[path]
    return tuple(
        GoldenCase(
            name=case["name"],
            kind=case["kind"],
            config=case["config"],
            arrays=tuple(arrays[case["name"]][i] for i in range(case["steps"])),
        )
        for case in listed
    )


def cases_of(*kinds: str) -> list[GoldenCase]:
    """The cases of the given kinds."""
    return [case for case in golden_cases() if case.kind in kinds]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        place = result
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return result


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def call_inputs(arrays: Arrays) -> dict[str, Any]:
    """A unified call's keyword arguments from one step's `in` group."""
    tree = nested(arrays)
    if "mtp" in tree:
        tree["mtp_params"] = tree.pop("mtp")
    return tree


def difference(got: Any, want: Any) -> float:
    """max |got − want| / max(max |want|, SMALLEST)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise AssertionError(f"shape {got.shape}, expected {want.shape}")
    if not want.size:
        return 0.0
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), SMALLEST))


def assert_close(got: Any, want: Any, tolerance: float, label: str) -> None:
    """Fails with the label where `difference` exceeds the tolerance, or is NaN."""
    error = difference(got, want)
    if not error <= tolerance:
        raise AssertionError(f"{label}: {error:.3g} > {tolerance}\n{got}\n{want}")


def compare(
    case: GoldenCase, step: int, group: str, got: Numbers, tolerance: float
) -> None:
    """Every stored entry of the group against `got`, but for the note's exceptions."""
    for key, want in case.arrays[step].get(group, {}).items():
        path = f"{group}/{key}"
        if path.startswith(case.skipped()):
            continue
        if key not in got:
            raise AssertionError(f"{case.name} step {step}: no {path}")
        assert_close(got[key], want, tolerance, f"{case.name} step {step} {path}")


# Calling the package ------------------------------------------------------------

Result = tuple[Numbers, Numbers, Numbers]


def on_device(tree: Any) -> Any:
    """Arrays of the current precision: float64 where x64 is on."""
    wide = jnp.result_type(float)

    def widen(x: NDArray) -> NDArray:
        return x.astype(wide) if np.issubdtype(x.dtype, np.floating) else x

    return jax.device_put(jax.tree.map(widen, tree))


def split_floats(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(float inputs without the mask, the others)."""
    fixed = {"attention_mask", "confidence_mask", "alpha", "log_weights", "losses"}
    floats = {
        k: v
        for k, v in inputs.items()
        if k not in fixed and jnp.issubdtype(jax.tree.leaves(v)[0].dtype, jnp.floating)
    }
    return floats, {k: v for k, v in inputs.items() if k not in floats}


def stored_gradients(grads: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients under the stored names: stacks by index, `mtp.` for the parameters."""
    flat: dict[str, Any] = {}
    for key, grad in grads.items():
        if key in ("additional_logits", "expert_outputs"):
            flat |= {f"{key}.{i}": part for i, part in enumerate(grad)}
        elif key == "mtp_params":
            flat |= flattened(grad, "mtp.")
        else:
            flat[key] = grad
    return flat


def unified_steps(case: GoldenCase) -> list[Result]:
    """The steps of a unified case, which share one state."""
    loss_fn = ava_jax.create_unified_loss(case.config)

    def call(floats: dict, fixed: dict, state: Any) -> tuple[Any, Any]:
        loss, aux, state = loss_fn(state, **floats, **fixed, train=True)
        return (loss, aux.get("mtp_loss", loss)), (aux, state)

    @jax.jit
    def run(floats: dict, fixed: dict, state: Any) -> tuple[Any, Any, Any]:
        losses, pull, (aux, after) = jax.vjp(
            lambda floats: call(floats, fixed, state), floats, has_aux=True
        )
        one, nothing = jnp.ones_like(losses[0]), jnp.zeros_like(losses[0])
        (grads,) = pull((one, nothing))
        if "mtp_params" in floats:
            (of_mtp,) = pull((nothing, one))
            grads = {**grads, "mtp_params": of_mtp["mtp_params"]}
        return aux, after, stored_gradients(grads)

    state, results = loss_fn.init(), []
    for groups in case.arrays:
        inputs = on_device(call_inputs(groups["in"]))
        aux, state, grads = run(*split_floats(inputs), state)
        results.append((aux, grads, flattened(ava_jax.statistics(state))))
    return results


def focal(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    alpha = x.get("alpha", case.config["alpha"])
    gamma = case.config["gamma"]
    rows = losses.focal_loss(x["inputs"], x["targets"], alpha=alpha, gamma=gamma)
    return {"loss": rows.mean()}


def label_smoothing(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    smoothing = case.config["smoothing"]
    rows = losses.label_smoothing_loss(x["inputs"], x["targets"], smoothing=smoothing)
    return {"loss": rows.mean()}


def consistency(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    rows = losses.consistency_loss(
        x["outputs_original"],
        x["outputs_augmented"],
        kind=case.config["consistency_type"],
        temperature=case.config["temperature"],
    )
    return {"loss": (rows * x.get("confidence_mask", 1.0)).mean()}


def perplexity(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    value = losses.perplexity(x["logits"], x["targets"])
    return {"loss": jnp.log(value), "perplexity": value}


def adaptive_scaling(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    loss, weights = losses.weigh_losses(x["losses"], x["log_weights"])
    return {"loss": loss, "weights": weights}


def contrastive_margin(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    loss = losses.contrastive_margin_loss(
        x["embeddings"],
        **{k: v for k, v in x.items() if k != "embeddings"},
        margin=case.config["margin"],
        normalize=case.config["normalize_embeddings"],
    )
    return {"loss": loss}


def expert_diversity(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    metric = case.config["similarity_metric"]
    value = losses.expert_diversity_loss(x["expert_outputs"], similarity=metric)
    return {"loss": value * case.config["diversity_weight"]}


def anti_repetition(case: GoldenCase, x: dict[str, Any]) -> dict[str, jax.Array]:
    options = {k: v for k, v in case.config.items() if k != "vocab_size"}
    mask = x.get("attention_mask")
    loss, aux = losses.anti_repetition_loss(x["logits"], x["labels"], mask, **options)
    return {**aux, "loss": loss}


def anti_repetition_schedule(
    case: GoldenCase, x: dict[str, Any]
) -> dict[str, jax.Array]:
    values, step = {}, x["step"].astype(jnp.result_type(int))
    for name, out in (("repetition", "repetition_penalty"), ("eos", "eos_penalty")):
        schedule = optax.linear_schedule(
            case.config[f"initial_{name}_weight"],
            case.config[f"final_{name}_weight"],
            case.config["warmup_steps"],
        )
        values[f"{out}_weight"] = jnp.asarray(schedule(step))
    return values


Call = Callable[[GoldenCase, dict[str, Any]], dict[str, jax.Array]]
STATELESS: dict[str, Call] = {
    "focal": focal,
    "label_smoothing": label_smoothing,
    "consistency": consistency,
    "perplexity": perplexity,
    "adaptive_scaling": adaptive_scaling,
    "contrastive_margin": contrastive_margin,
    "expert_diversity": expert_diversity,
    "anti_repetition": anti_repetition,
    "anti_repetition_schedule": anti_repetition_schedule,
}


def stateless_steps(case: GoldenCase) -> list[Result]:
    """The steps of any other kind: out, and the gradient of `loss`."""
    call = STATELESS[case.kind]

    @jax.jit
    def run(floats: dict, fixed: dict) -> tuple[Any, Any]:
        def loss(floats: dict) -> tuple[jax.Array, Any]:
            out = call(case, {**floats, **fixed})
            return out["loss"], out

        if not floats:
            return call(case, fixed), {}
        grads, out = jax.grad(loss, has_aux=True)(floats)
        return out, stored_gradients(grads)

    steps = (split_floats(on_device(dict(groups["in"]))) for groups in case.arrays)
    return [(*run(*arrays), {}) for arrays in steps]


def run_case(case: GoldenCase) -> list[Result]:
    """(out, grad, state) at every step, from the package."""
    return unified_steps(case) if case.kind == "unified" else stateless_steps(case)
