"""Log-probabilities, policies and teachers against float64 oracles, drawn at random."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from numpy.random import Generator, default_rng
from support import distillation_oracles
from support.log_probs_oracle import log_probs_oracle
from support.oracle_scenarios import (
    SEEDS,
    SHAPES,
    counted_places,
    draw_logits,
    draw_mask,
    draw_targets,
    fused_inputs,
    path_logits,
    pick,
    poison,
    spoil_targets,
)
from support.post_training_oracles import PolicyOracle
from test_properties import FLOAT32, assert_near, examples

import ava_jax
from ava_jax import terms

pytestmark = pytest.mark.every_platform

KINDS = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
TEACHER_WIDTH = 4


class Drawn:
    """A student's arguments, with junk wherever nothing counts.

    Attributes:
      config: `vocab_size`, `logit_soft_cap` and sizes.
      inputs: the arrays of one path, targets and mask.
      logits: the student's in float64.
      weights: of the tokens, [B, S].
    """

    def __init__(self, rng: Generator) -> None:
        rows, length, vocab = pick(rng, SHAPES[:-1])
        targets = draw_targets(rng, (rows, length), vocab)
        if pick(rng, [True, False]):
            targets = spoil_targets(rng, targets, -100)
        mask = draw_mask(
            rng, pick(rng, ["none", "bool", "float", "empty"]), (rows, length)
        )
        self.inputs: dict[str, Any] = {"targets": targets}
        if mask is not None:
            self.inputs["attention_mask"] = mask
        plain = {"vocab_size": vocab}
        self.active = counted_places(plain, self.inputs)
        given = np.ones(targets.shape) if mask is None else mask.astype(np.float64)
        self.weights = np.where(self.active, given, 0.0)
        extra, self.is_fused = pick(rng, [0, 3]), pick(rng, [True, False])
        if self.is_fused:
            arrays = fused_inputs(rng, plain, self.inputs, extra, 2.0)
            hidden, head, bias = (x.astype(np.float64) for x in arrays.values())
            with np.errstate(invalid="ignore"):
                self.logits = hidden @ head + bias
        else:
            z = path_logits(
                rng, plain, self.inputs, extra, 2.0, pick(rng, [True, False])
            )
            arrays, self.logits = {"logits": z}, z.astype(np.float64)
        self.inputs |= arrays
        self.config: dict[str, Any] = {
            "vocab_size": vocab,
            "logit_soft_cap": pick(rng, [None, None, 5.0]),
            "chunk_size": pick(rng, [None, 1, 4]) if self.is_fused else None,
            "implementation": pick(rng, [None, None, "xla", "reference"]),
        }

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape

    def of_tokens(self, rng: Generator, values: Any) -> Any:
        """Numbers per token, with junk at masked ones."""
        return poison(rng, values[..., None], self.active)[..., 0]

    def values(self, temperature: float, cotangents: Any = None) -> Any:
        """What the oracle computes of the targets."""
        zeros = np.zeros((3, *self.shape))
        return log_probs_oracle(
            self.logits,
            self.inputs["targets"],
            self.active,
            zeros if cotangents is None else cotangents,
            vocab_size=self.config["vocab_size"],
            temperature=temperature,
            soft_cap=self.config["logit_soft_cap"],
        )


@examples(12)
@given(seed=SEEDS)
def test_log_probabilities(seed: int) -> None:
    rng = default_rng(seed)
    drawn, temperature = Drawn(rng), pick(rng, [1.0, 0.7, 1.5])
    cotangents = rng.normal(size=(3, *drawn.shape)).astype(np.float32)
    cotangents[:, ~drawn.active] = 0
    source = "hidden_states" if drawn.is_fused else "logits"

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(x: Any, rest: Any) -> Any:
        out = ava_jax.token_log_probs(
            **{**rest, source: x}, temperature=temperature, **drawn.config
        )
        values = (out.log_probs, out.entropy, out.log_z)
        return sum(
            (c * v).sum() for c, v in zip(cotangents, values, strict=True)
        ), values

    rest = jax.device_put({k: v for k, v in drawn.inputs.items() if k != source})
    (_, values), gradient = run(jax.device_put(drawn.inputs[source]), rest)
    want = drawn.values(temperature, cotangents.astype(np.float64))
    for name, got, one in zip(
        ("log_probs", "entropy", "log_z"), values, want.values, strict=True
    ):
        assert_near(name, got, one, FLOAT32)
    of_source = want.of_logits
    if drawn.is_fused:
        vocab = drawn.config["vocab_size"]
        head = drawn.inputs["lm_head"].astype(np.float64)[:, :vocab]
        of_source = of_source[..., :vocab] @ head.T
    assert_near("gradient", gradient, of_source, (1e-4, 1e-4))


@examples(20)
@given(seed=SEEDS)
def test_policies(seed: int) -> None:
    rng = default_rng(seed)
    drawn, temperature = Drawn(rng), pick(rng, [1.0, 0.7])
    kind = pick(rng, list(KINDS))
    options: dict[str, Any] = {
        "kl_weight": pick(rng, [0.0, 0.3]),
        "entropy_weight": pick(rng, [0.0, 0.2]),
        "kl_importance_weighting": pick(rng, [True, False]),
        "kl_estimator": pick(rng, [None, "k2", "k3"]),
    }
    if kind == "dr_grpo":
        options["max_length"] = 50
    if kind not in ("sapo", "cispo"):
        options |= {"clip_low": 0.1, "ratio_cap": pick(rng, [None, 1.5])}
    values = drawn.values(temperature).values
    own = np.where(drawn.active, values[0], -1.0)
    near = {
        name: own + rng.normal(size=drawn.shape) / 3
        for name in ("old_log_probs", "ref_log_probs")
    }
    arrays = {
        "advantages": rng.normal(size=drawn.shape),
        "sampler_weights": rng.uniform(0.5, 2.0, drawn.shape),
        **near,
    }
    if pick(rng, [True, False]):
        del arrays["sampler_weights"]
    extra = {name: x.astype(np.float32) for name, x in arrays.items()}
    oracle = PolicyOracle(
        {
            "log_probs": own,
            "entropy": values[1],
            "mask": drawn.weights,
            **{name: x.astype(np.float64) for name, x in extra.items()},
        },
        kind=kind,
        **options,
    )
    term = terms.PolicyTerm(kind, logits_temperature=temperature, **options)
    loss_fn = ava_jax.compose([term], **drawn.config)
    given = {
        **drawn.inputs,
        "extra_inputs": {k: drawn.of_tokens(rng, x) for k, x in extra.items()},
    }
    loss, aux, _ = jax.jit(lambda x: loss_fn(loss_fn.init(), **x))(
        jax.device_put(given)
    )
    assert_near("loss", loss, oracle.loss(), FLOAT32)
    for name, value in oracle.aux().items():
        key = {"kl": "policy_kl", "entropy": "policy_entropy"}.get(name, name)
        if name != "policy_loss":
            assert_near(name, aux[key], value, FLOAT32)


@examples(16)
@given(seed=SEEDS)
def test_teachers(seed: int) -> None:
    rng = default_rng(seed)
    drawn, temperature = Drawn(rng), pick(rng, [1.0, 2.0])
    vocab, is_whole = drawn.config["vocab_size"], pick(rng, [True, False])
    shape = (*drawn.shape, vocab)
    options: dict[str, Any] = {"temperature": temperature}
    if is_whole:
        options["beta"] = pick(rng, [0.0, 0.3, 1.0])
    else:
        options["tail"] = pick(rng, [True, False])
    if is_whole and drawn.is_fused:
        hidden = draw_logits(rng, (*drawn.shape, TEACHER_WIDTH), 1.0)
        head = draw_logits(rng, (TEACHER_WIDTH, vocab), 1.0)
        teacher = hidden.astype(np.float64) @ head
        hidden = poison(rng, hidden, drawn.active)
        arrays = {"teacher_hidden_states": hidden, "teacher_lm_head": head}
    else:
        teacher = draw_logits(rng, shape, 2.0)
        arrays = {"teacher_logits": poison(rng, teacher, drawn.active)}
    given = (drawn.logits, teacher.astype(np.float64))
    caps = {"vocab_size": vocab, "soft_cap": drawn.config["logit_soft_cap"]}
    # A class that is impossible for the student alone makes KL(q‖p) infinite.
    student = np.where(np.isneginf(drawn.logits), -50.0, drawn.logits)
    if not drawn.is_fused:
        drawn.inputs["logits"] = student.astype(np.float32)
    if is_whole:
        want = distillation_oracles.distillation(
            student, given[1], drawn.weights, **caps, **options
        )
    else:
        k = int(rng.integers(1, vocab))
        log_q = teacher / temperature
        log_q = log_q - np.log(np.exp(log_q).sum(-1, keepdims=True))
        ids = np.argsort(-log_q, -1)[..., :k].astype(np.int32)
        ids[rng.random(ids.shape) < 0.1] = pick(rng, [-1, vocab])
        known = np.take_along_axis(log_q, np.clip(ids, 0, vocab - 1), -1)
        log_probs = known.astype(np.float32)
        want = distillation_oracles.top_k_distillation(
            student, ids, log_probs.astype(np.float64), drawn.weights, **caps, **options
        )
        junk = poison(rng, log_probs, drawn.active)
        arrays = {"teacher_ids": ids, "teacher_log_probs": junk}
    rest = {k: v for k, v in drawn.inputs.items() if k != "targets"}
    # It has no targets: the ids that are no classes leave nothing out.
    rest["attention_mask"] = drawn.weights.astype(np.float32)

    @jax.jit
    def run(x: Any) -> Any:
        return ava_jax.distillation_loss(**x, **options, **drawn.config)

    loss, _ = run(jax.device_put({**rest, **arrays}))
    assert_near("loss", loss, want, (2e-4, 2e-5))
