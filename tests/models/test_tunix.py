"""Tunix's losses of post-training and ours, of the same model on the same tokens."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from support.model_checks import REASON, TUNIX_WARNINGS, B, V, by_path
from support.tunix_checks import PAD, Fused, fused_of, llama, masks_of

import ava_jax
from ava_jax import losses, terms

common = pytest.importorskip("tunix.rl.common", reason=REASON)
core = pytest.importorskip("tunix.rl.algo_core", reason=REASON)
dpo = pytest.importorskip("tunix.sft.dpo.dpo_trainer", reason=REASON)

pytestmark = TUNIX_WARNINGS

EOS = 1
PROMPT, COMPLETION = 5, 12
LENGTHS = (12, 3, 7, 9)

Loss = Callable[[Any], tuple[jax.Array, Any]]


class Sample(NamedTuple):
    """Prompts, padded on the left, their completions, padded on the right, and more.

    Attributes:
      prompts: ids [B, P].
      completions: ids [B, C].
      mask: 1 at the completions' tokens, [B, C].
      advantages: of each row, [B].
      old: log-probabilities of the policy that generated the tokens, [B, C].
      ref: those of the reference.
      weights: a sampler's.
    """

    prompts: jax.Array
    completions: jax.Array
    mask: jax.Array
    advantages: jax.Array
    old: jax.Array
    ref: jax.Array
    weights: jax.Array

    @property
    def ids(self) -> jax.Array:
        """Both, [B, P + C]."""
        return jnp.concatenate([self.prompts, self.completions], 1)


@functools.cache
def make(vocab: int = V) -> tuple[Any, Any]:
    """The model, as its definition and its parameters."""
    return nnx.split(llama(vocab_size=vocab))


@functools.cache
def sample() -> Sample:
    """One batch; the ratios are within the bounds at some tokens, beyond at others."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, V, (B, PROMPT))
    prompts[1, :3] = prompts[2, :1] = PAD
    mask = np.arange(COMPLETION) < np.reshape(LENGTHS, (-1, 1))
    completions = np.where(mask, rng.integers(2, V, mask.shape), PAD)
    old, ref = (rng.normal(size=mask.shape) - np.log(V) - 0.5 for _ in range(2))
    return Sample(
        jnp.asarray(prompts),
        jnp.asarray(completions),
        jnp.asarray(mask, jnp.int32),
        jnp.asarray([1.0, -1.5, 0.5, -0.2], jnp.float32),
        jnp.asarray(old, jnp.float32),
        jnp.asarray(ref, jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, mask.shape), jnp.float32),
    )


def arrays_of(model: Any, ids: jax.Array, keep: int) -> Fused:
    """What the losses take of the last `keep` tokens, whose rows are padded."""
    return fused_of(model, ids, ids != PAD, keep)


def graded(loss: Loss) -> tuple[float, dict[str, NDArray], dict[str, NDArray]]:
    """The loss of the model, its report and its gradients, by path."""
    graphdef, state = make()

    def of_state(state: Any) -> Any:
        return loss(nnx.merge(graphdef, state))

    (value, aux), grads = jax.jit(jax.value_and_grad(of_state, has_aux=True))(state)
    return float(value), {k: np.asarray(x) for k, x in aux.items()}, by_path(grads)


def check_same(own: dict[str, NDArray], theirs: dict[str, NDArray]) -> None:
    """Every gradient is theirs, and some are not 0."""
    assert set(own) == set(theirs)
    assert max(abs(x).max() for x in theirs.values()) > 1e-3
    for name, x in theirs.items():
        np.testing.assert_allclose(own[name], x, rtol=1e-4, atol=1e-6, err_msg=name)


# Log-probabilities ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs(temperature: float) -> None:
    data = sample()

    def reduced(log_probs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        kept = jnp.where(data.mask != 0, log_probs, 0)
        return jnp.sum(kept * data.advantages[:, None]), {"log_probs": kept}

    def theirs(model: Any) -> tuple[jax.Array, Any]:
        log_probs = common.compute_per_token_logps(
            *nnx.split(model),
            prompt_tokens=data.prompts,
            completion_tokens=data.completions,
            pad_id=PAD,
            eos_id=EOS,
            stop_gradient=False,
            temperature=temperature,
        )
        return reduced(log_probs)

    def own(model: Any) -> tuple[jax.Array, Any]:
        out = ava_jax.token_log_probs(
            **arrays_of(model, data.ids, COMPLETION),
            attention_mask=data.mask,
            temperature=temperature,
        )
        return reduced(out.log_probs)

    (_, given, grads), (_, expected, their_grads) = graded(own), graded(theirs)
    found, log_probs = given["log_probs"], expected["log_probs"]
    np.testing.assert_allclose(found, log_probs, rtol=1e-5, atol=1e-6)
    assert (log_probs[data.mask != 0] < -1).all()
    check_same(grads, their_grads)


# GRPO ----------------------------------------------------------------------------


def their_grpo(data: Sample, **options: Any) -> Loss:
    """Tunix's loss of a batch, with its options."""
    weighted = options.pop("sampler_weights", False)
    config = SimpleNamespace(
        **{
            "beta": 0.0,
            "epsilon": 0.2,
            "loss_algo": "grpo",
            "loss_agg_mode": "sequence-mean-token-mean",
            "temperature": 1.0,
            "kl_loss_mode": "low_var_kl",
            "kl_clamp_value": None,
        }
        | options
    )
    example = common.TrainExample(
        prompt_ids=data.prompts,
        prompt_mask=data.prompts != PAD,
        completion_ids=data.completions,
        completion_mask=data.mask,
        advantages=data.advantages,
        ref_per_token_logps=data.ref,
        old_per_token_logps=data.old,
        sampler_is_weights=data.weights if weighted else None,
    )
    return lambda model: core.grpo_loss_fn(model, example, config, PAD, EOS)


def constants_of(data: Sample, *, weighted: bool = False) -> dict[str, jax.Array]:
    constants = {"old_log_probs": data.old, "ref_log_probs": data.ref}
    return constants | ({"sampler_weights": data.weights} if weighted else {})


def two_passes(
    data: Sample, *, weighted: bool = False, temperature: float = 1.0, **options: Any
) -> Loss:
    """Our loss of the log-probabilities."""

    def loss(model: Any) -> tuple[jax.Array, Any]:
        out = ava_jax.token_log_probs(
            **arrays_of(model, data.ids, COMPLETION),
            attention_mask=data.mask,
            temperature=temperature,
        )
        constants: Any = constants_of(data, weighted=weighted)
        return losses.policy_loss(
            out.log_probs,
            data.advantages,
            data.mask,
            entropy=out.entropy,
            **constants,
            **options,
        )

    return loss


def one_pass(
    data: Sample, *, weighted: bool = False, temperature: float = 1.0, **options: Any
) -> Loss:
    """Our loss as a term of the pass."""
    term = terms.PolicyTerm(logits_temperature=temperature, **options)
    loss_fn = ava_jax.compose([term], vocab_size=V)
    advantages = jnp.broadcast_to(data.advantages[:, None], data.mask.shape)
    extra = {"advantages": advantages} | constants_of(data, weighted=weighted)

    def loss(model: Any) -> tuple[jax.Array, Any]:
        found, aux, _ = loss_fn(
            loss_fn.init(),
            **arrays_of(model, data.ids, COMPLETION),
            attention_mask=data.mask,
            extra_inputs=extra,
        )
        kept = ("policy_kl", "clip_fraction", "mean_ratio", "policy_entropy")
        return found, {name.removeprefix("policy_"): aux[name] for name in kept}

    return loss


SAME = {
    "grpo": ({}, {}),
    "k3": ({"beta": 0.1}, {"kl_weight": 0.1}),
    "k2": (
        {"beta": 0.1, "kl_loss_mode": "mse_kl"},
        {"kl_weight": 0.1, "kl_estimator": "k2"},
    ),
    "dapo": (
        {"loss_agg_mode": "token-mean", "epsilon_high": 0.28},
        {"kind": "dapo", "clip_high": 0.28},
    ),
    "dr_grpo": (
        {"loss_agg_mode": "sequence-mean-token-scale"},
        {"kind": "dr_grpo", "max_length": COMPLETION},
    ),
    "sampler": ({"sampler_weights": True}, {"weighted": True}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "dual clip": ({"epsilon_c": 1.5}, {"ratio_cap": 1.5}),
    "gspo": ({"loss_algo": "gspo-token"}, {"ratio_level": "sequence"}),
}


@functools.cache
def theirs_of(name: str) -> Any:
    """Tunix's loss, report and gradients."""
    return graded(their_grpo(sample(), **SAME[name][0]))


@pytest.mark.parametrize("name", SAME)
def test_grpo(name: str) -> None:
    options, data = SAME[name][1], sample()
    theirs, their_aux, their_grads = theirs_of(name)
    # A term of tokens cannot see the ratio of a row.
    makers = [two_passes] if "ratio_level" in options else [two_passes, one_pass]
    for make_loss in makers:
        loss, aux, grads = graded(make_loss(data, **options))
        assert loss == pytest.approx(theirs, rel=1e-5)
        check_same(grads, their_grads)
        assert aux["kl"] == pytest.approx(their_aux["kl"], rel=1e-4)
        assert aux["mean_ratio"] == pytest.approx(their_aux["is_ratio/mean"], rel=1e-5)
        assert 0.1 < aux["clip_fraction"] < 0.9 or name == "gspo"
        if name != "dual clip":  # they count what this bound replaces apart
            clipped = their_aux["pg_clipfrac"]
            assert aux["clip_fraction"] == pytest.approx(clipped, rel=1e-5)
        if name == "dapo":  # the mean over tokens, as ours always is
            assert aux["entropy"] == pytest.approx(their_aux["entropy"], rel=1e-5)


def test_settings_are_apart() -> None:
    """The comparison is not blind: another setting's loss is not the same."""
    values = sorted(theirs_of(name)[0] for name in SAME)
    assert min(np.diff(values)) > 5e-5, values


def test_rows_without_tokens_are_rows_of_ours() -> None:
    """Theirs are not counted; the same number can be given to ours."""
    data = sample()
    mask = data.mask.at[1].set(0)
    data = data._replace(mask=mask)
    theirs, _, grads = graded(their_grpo(data))
    assert graded(two_passes(data))[0] == pytest.approx(theirs * (B - 1) / B, rel=1e-5)
    loss, _, own_grads = graded(two_passes(data, num_rows=B - 1))
    assert loss == pytest.approx(theirs, rel=1e-5)
    check_same(own_grads, grads)


def test_masked_nan_reaches_theirs_alone() -> None:
    """They multiply by the mask, we replace."""
    data = sample()
    expected, _, grads = graded(two_passes(data))
    data = data._replace(old=data.old.at[1, -1].set(jnp.nan))
    assert np.isnan(graded(their_grpo(data))[0])
    loss, _, own_grads = graded(two_passes(data))
    assert loss == pytest.approx(expected, rel=1e-6)
    check_same(own_grads, grads)


def test_their_log_ratio_ends_at_20() -> None:
    """Ours goes on, with its gradient, to half the largest exponent of a float."""
    data = sample()
    ratio = data.old.at[1, 0].set(-30)
    data = data._replace(old=ratio)
    theirs, own = graded(their_grpo(data)), graded(two_passes(data))
    log_prob = np.log(own[0] / theirs[0]) - 30 + 20
    assert -6 < log_prob < -3
    head = next(name for name in own[2] if "lm_head" in name)
    assert abs(theirs[2][head]).max() < 1
    assert abs(own[2][head]).max() > 1e8


# Preferences ---------------------------------------------------------------------


def their_pairs(data: Sample, **options: Any) -> Loss:
    """Tunix's loss of pairs: the first half of the rows are the preferred ones."""
    positions, attention = masks_of(data.ids != PAD)
    sums = jnp.sum(data.ref * data.mask, -1)
    example = dpo.TrainExample(
        input_ids=data.ids,
        positions=positions,
        attention_mask=attention,
        ref_chosen_logps=sums[: B // 2],
        ref_rejected_logps=sums[B // 2 :],
        completion_mask=data.mask,
        logits_to_keep=COMPLETION,
    )
    return lambda model: dpo.dpo_loss_fn(model, example, **options)


def own_pairs(data: Sample, loss_of: Callable[..., jax.Array]) -> Loss:
    """The mean of a loss of the pairs' log-probabilities, and of their tokens'."""

    def loss(model: Any) -> tuple[jax.Array, Any]:
        out = ava_jax.token_log_probs(
            **arrays_of(model, data.ids, COMPLETION), attention_mask=data.mask
        )
        pairs = []
        for average in (False, True):
            rows = losses.sequence_log_probs(out.log_probs, data.mask, average=average)
            pairs.append((rows[: B // 2], rows[B // 2 :]))
        return jnp.mean(loss_of(*pairs)), {}

    return loss


def test_dpo() -> None:
    data = sample()
    sums = losses.sequence_log_probs(data.ref, data.mask)
    ref = sums[: B // 2], sums[B // 2 :]

    def sigmoid(pair: Any, _: Any) -> jax.Array:
        return losses.dpo_loss(pair[0], pair[1], ref[0], ref[1], beta=0.2)[0]

    def smoothed(pair: Any, _: Any) -> jax.Array:
        ratios = [own - other for own, other in zip(pair, ref, strict=True)]
        return losses.cpo_loss(*ratios, beta=0.2, label_smoothing=0.1)[0]

    found = []
    for loss_of, smoothing in ((sigmoid, 0.0), (smoothed, 0.1)):
        own, _, grads = graded(own_pairs(data, loss_of))
        options = {"beta": 0.2, "label_smoothing": smoothing}
        theirs, _, their_grads = graded(their_pairs(data, **options))
        assert own == pytest.approx(theirs, rel=1e-5)
        check_same(grads, their_grads)
        found.append(own)
    assert abs(found[0] - found[1]) > 1e-2


def test_orpo() -> None:
    """Theirs has the odds of whole rows; the method's are those of a row's mean."""
    data = sample()

    def of_sums(sums: Any, means: Any) -> jax.Array:
        return losses.orpo_loss(*sums, beta=0.3)[0] - means[0]

    def of_means(_: Any, means: Any) -> jax.Array:
        return losses.orpo_loss(*means, beta=0.3)[0] - means[0]

    theirs = their_pairs(data, algorithm="orpo", lambda_orpo=0.3)
    expected, _, their_grads = graded(theirs)
    own, _, grads = graded(own_pairs(data, of_sums))
    assert own == pytest.approx(expected, rel=1e-5)
    check_same(grads, their_grads)
    assert abs(graded(own_pairs(data, of_means))[0] - expected) > 0.1


# Memory --------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
def test_their_logits_are_not_made() -> None:
    vocab, length = 4096, 256
    graphdef, state = make(vocab)
    zeros = jnp.zeros((B, length), jnp.float32)
    ids = jnp.ones((B, length), jnp.int32)
    data = Sample(ids[:, :1], ids, ids, zeros[:, 0], zeros, zeros, zeros)

    def own(model: Any) -> tuple[jax.Array, Any]:
        out = ava_jax.token_log_probs(
            **arrays_of(model, data.ids, length),
            attention_mask=data.mask,
            chunk_size=32,
        )
        constants: Any = constants_of(data)
        return losses.policy_loss(
            out.log_probs, data.advantages, data.mask, entropy=out.entropy, **constants
        )

    def temporaries(loss: Loss) -> int:
        def of_state(state: Any) -> Any:
            return loss(nnx.merge(graphdef, state))

        step = jax.jit(jax.value_and_grad(of_state, has_aux=True))
        memory = step.lower(state).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * B * length * vocab
    assert temporaries(their_grpo(data)) > 3 * logits
    assert temporaries(own) < logits
