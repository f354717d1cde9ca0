"""The adapter for MaxText: its loss and ours, of the same model on the same rows."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from support.maxtext_models import (
    LENGTH,
    REASON,
    ROWS,
    Batch,
    Made,
    as_in_training,
    batch,
    call,
    hidden_states,
    make,
)
from support.trees import assert_trees_close

from benchmarks.maxtext_training import EVERYTHING, PLAIN

train = pytest.importorskip("maxtext.trainers.pre_train.train", reason=REASON)
tiling = pytest.importorskip("maxtext.utils.vocabulary_tiling", reason=REASON)
adapter = pytest.importorskip("maxtext_loss", reason=REASON)

pytestmark = pytest.mark.filterwarnings("ignore")

UNTIED: dict[str, Any] = {"z_loss_multiplier": 1e-2}
TIED = {**UNTIED, "logits_via_embedding": "true"}
HEADS = {
    "untied": UNTIED,
    "tied": TIED,
    "tied, capped": {
        **TIED,
        "normalize_embedding_logits": "false",
        "final_logits_soft_cap": 3.0,
    },
    "context": {
        **UNTIED,
        "ici_tensor_parallelism": 1,
        "ici_context_parallelism": 2,
        "context_parallel_load_balance": "false",
    },
}
# MaxText rounds the gradient of the tied table to bfloat16, and so do we.
TOLERANCE = {"untied": 1e-5, "tied": 5e-3, "tied, capped": 5e-3, "context": 1e-5}


@functools.cache
def pair(head: str) -> tuple[Made, Made]:
    """A model with MaxText's loss, and the same one with ours."""
    return make(None, **HEADS[head]), make(PLAIN, **HEADS[head])


def relative(a: jax.Array, b: jax.Array) -> float:
    return float(abs(a - b) / abs(b))


# One step ------------------------------------------------------------------------


def test_the_adapter_is_short() -> None:
    assert len(Path(adapter.__file__).read_text().splitlines()) <= 60


@pytest.mark.parametrize("head", HEADS)
def test_sums_and_gradients_are_those_of_maxtext(head: str) -> None:
    data, hidden = batch(), hidden_states()
    theirs, ours = (call(made, data, hidden) for made in pair(head))
    assert relative(ours.total, theirs.total) < 1e-5
    assert relative(ours.z_loss, theirs.z_loss) < 1e-5
    assert theirs.z_loss > 1e-2 * theirs.total
    assert_trees_close(ours.hidden, theirs.hidden, 1e-5)
    found, expected = (nnx.to_pure_dict(result.params) for result in (ours, theirs))
    assert_trees_close(found, expected, TOLERANCE[head])
    norm = expected["decoder"]["decoder_norm"]["scale"]
    assert np.abs(np.asarray(norm)).max() > 0


def test_the_loss_knows_how_the_head_is_sharded() -> None:
    _, ours = pair("untied")
    with mock.patch.object(adapter, "create", wraps=adapter.create) as create:
        call(ours, batch(), hidden_states())
    assert create.call_args.kwargs == {
        "mesh": ours.model.mesh,
        "batch_axes": "fsdp",
        "sequence_axis": None,
        "vocab_axis": "tensor",
    }
    assert {"fsdp": 4, "tensor": 2}.items() <= dict(ours.model.mesh.shape).items()


def test_dropout_is_for_training_alone() -> None:
    dropped = make(PLAIN, **UNTIED, dropout_rate=0.5)
    _, kept = pair("untied")
    data, hidden = batch(), hidden_states()
    expected = call(kept, data, hidden).total
    assert call(dropped, data, hidden, False).total == expected
    assert relative(call(dropped, data, hidden).total, expected) > 1e-2


# What the loss does otherwise -----------------------------------------------------


def spoiled(data: Batch) -> jax.Array:
    """Hidden states that are no numbers where the rows are padded."""
    padding = data["targets_segmentation"] == 0
    return jnp.where(padding[..., None], jnp.nan, hidden_states())


def test_padding_may_hold_nan() -> None:
    data, (theirs, ours) = batch(), pair("untied")
    clean, found = (call(ours, data, h) for h in (hidden_states(), spoiled(data)))
    assert jnp.isnan(call(theirs, data, spoiled(data)).total)
    assert found.total == clean.total
    padding = np.asarray(data["targets_segmentation"]) == 0
    gradient = np.asarray(found.hidden)
    assert (gradient[padding] == 0).all()
    np.testing.assert_array_equal(
        gradient[~padding], np.asarray(clean.hidden)[~padding]
    )


def log_z_and_nll(x: NDArray, head: NDArray, data: Batch) -> tuple[float, float]:
    """Σ log²z and Σ nll over unmasked tokens in float64, token by token."""
    squares, nll = 0.0, 0.0
    for b in range(ROWS):
        for t in range(LENGTH):
            if data["targets_segmentation"][b, t] == 0:
                continue
            z = x[b, t] @ head
            log_z = z.max() + np.log(np.exp(z - z.max()).sum())
            squares += log_z**2
            nll += log_z - z[int(data["targets"][b, t])]
    return squares, nll


def test_logits_are_not_rounded_to_bfloat16() -> None:
    settings = {**UNTIED, "dtype": "bfloat16"}
    theirs, ours = make(None, **settings), make(PLAIN, **settings)
    data, hidden = batch(), hidden_states().astype(jnp.bfloat16)
    decoder = ours.model.decoder
    x = np.asarray(decoder.decoder_norm(hidden), np.float64)
    head = decoder.logits_dense.kernel[...].astype(jnp.bfloat16)
    squares, nll = log_z_and_nll(x, np.asarray(head, np.float64), data)
    exact = nll + 1e-2 * squares
    errors = [
        abs(float(call(made, data, hidden).total) - exact) / exact
        for made in (theirs, ours)
    ]
    assert errors[1] < 2e-6 < errors[0] < 1e-3


def test_the_z_loss_is_part_of_the_sum() -> None:
    data, hidden, (_, ours) = batch(), hidden_states(), pair("untied")
    decoder = ours.model.decoder
    x = np.asarray(decoder.decoder_norm(hidden), np.float64)
    head = np.asarray(decoder.logits_dense.kernel[...], np.float64)
    squares, nll = log_z_and_nll(x, head, data)
    found = call(ours, data, hidden)
    np.testing.assert_allclose(found.z_loss, 1e-2 * squares, rtol=1e-5)
    np.testing.assert_allclose(found.total, nll + 1e-2 * squares, rtol=1e-5)


def test_the_gradient_of_a_tied_table_is_rounded_once() -> None:
    data, hidden, (theirs, ours) = batch(), hidden_states(), pair("tied")
    tiles = theirs._replace(hook=tiling.vocab_tiling_nnx_loss)

    def gradient(made: Made) -> NDArray[np.float32]:
        params = nnx.to_pure_dict(call(made, data, hidden).params)
        return np.asarray(params["token_embedder"]["embedding"])

    one, *others = map(gradient, (theirs, ours, tiles))
    rounding, more = (np.linalg.norm(x - one) / np.linalg.norm(one) for x in others)
    assert rounding < 1e-4 < 1e-3 < more < 1e-2


def test_ids_outside_of_the_vocabulary_add_nothing() -> None:
    data, hidden = dict(batch()), hidden_states()
    data["targets"] = data["targets"].at[0, 3].set(512).at[2, 1].set(-1)
    theirs, ours = (call(made, data, hidden) for made in pair("untied"))
    # MaxText's sum keeps these tokens' z-loss.
    extra = theirs.z_loss - ours.z_loss
    assert extra > 0.1
    np.testing.assert_allclose(theirs.total - ours.total, extra, rtol=1e-3)


def test_nothing_unmasked_adds_nothing() -> None:
    _, ours = pair("untied")
    data = {**batch(), "targets_segmentation": jnp.zeros((ROWS, LENGTH), int)}
    found = call(ours, data, spoiled(data))
    assert found.total == found.z_loss == 0
    assert not np.asarray(found.hidden).any()
    assert int(found.state.step) == 0


# Every term -----------------------------------------------------------------------


@functools.cache
def everything() -> Made:
    penalty = {"ngram_size": 2, "ngram_penalty_weight": 5.0}
    return make({**EVERYTHING, **penalty}, **UNTIED)


def test_penalties_stay_within_a_document() -> None:
    data = batch()
    merged = jnp.minimum(data["targets_segmentation"], 1)
    apart, together = (
        call(everything(), {**data, "targets_segmentation": s}, hidden_states())
        for s in (data["targets_segmentation"], merged)
    )
    assert apart.z_loss == together.z_loss
    # Far more than the rounding error of the sum.
    assert abs(apart.total - together.total) > 1e-2


def test_only_training_moves_the_state() -> None:
    steps = [
        int(call(everything(), batch(), hidden_states(), is_train).state.step)
        for is_train in (True, False)
    ]
    assert steps == [1, 0]


# Errors ---------------------------------------------------------------------------


def test_the_z_loss_is_set_in_maxtext() -> None:
    with pytest.raises(TypeError, match="z_loss_weight"):
        make({**PLAIN, "z_loss_weight": 1e-4})


def test_a_loss_that_would_not_be_called_is_refused() -> None:
    with pytest.raises(ValueError, match="num_vocab_tiling=2"):
        make(PLAIN, num_vocab_tiling=1)


def test_reordered_rows_are_refused() -> None:
    made = make(PLAIN, **HEADS["context"] | {"context_parallel_load_balance": "true"})
    with pytest.raises(ValueError, match="context_parallel_load_balance=false"):
        call(made, batch(), hidden_states())


def test_a_quantized_head_is_refused() -> None:
    _, (config, model, hook) = pair("untied")
    dense = model.decoder.logits_dense
    del dense.kernel_scale
    with (
        mock.patch.object(type(dense), "kernel_scale", 1.0, create=True),
        as_in_training(config, model.mesh),
        pytest.raises(ValueError, match="unquantized_modules"),
    ):
        hook(model, hidden_states(), batch(), config, True)
    dense.kernel_scale = None
